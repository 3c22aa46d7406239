"""Tests ranks of labels, ties, and the division of class names over ranks."""

import pytest
import torch

from beit3_ds.data.packing import pack_inputs
from beit3_ds.tasks.imagenet.scores import ClassScores, score_images, share_of_batches


def test_equal_scores_are_ordered_by_label() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [4.0, 1.0, 2.0, 3.0]])
    found = score_images(scores, torch.tensor([3, 0, 1]))
    assert found["ranks"].tolist() == [1, 0, 3]
    assert found["best"].tolist() == [[1, 3, 2, 0], [0, 1, 2, 3], [0, 3, 2, 1]]
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([3, 0, 1]), reduction="none")
    torch.testing.assert_close(found["losses"], expected)


def test_metrics_count_the_first_and_the_first_five() -> None:
    ranks = torch.tensor([0, 0, 4, 5, 9])
    scores = ClassScores(torch.arange(5), torch.zeros(5), ranks, torch.zeros(5, 5), torch.tensor([0.0, 1, 2, 3, 4]))
    assert scores.metrics() == pytest.approx({"classes": 2.0, "accuracy": 0.4, "top5": 0.6, "images": 5.0})
    assert scores._replace(labels=torch.empty(0)).metrics() == {}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_share_all_batches_evenly(size: int) -> None:
    def batch(count: int) -> object:
        return pack_inputs(num_images=0, pixels=None, num_patches=4, texts=[torch.zeros(2).long().numpy()] * count)

    batches = [batch(count) for count in (5, 5, 2)]
    shares = [share_of_batches(iter(batches), batch(0), rank, size) for rank in range(size)]  # type: ignore[arg-type]
    assert len({len(share) for share in shares}) == 1
    turns = [share[turn].num_texts for turn in range(len(shares[0])) for share in shares]
    assert turns[:3] == [5, 5, 2] and not any(turns[3:])
