"""Compares recall with its definition, on any number of processes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.tasks.retrieval import recall as recall_module
from beit3_ds.tasks.retrieval.recall import match_ranks, recall

SIZES = st.integers(1, 9)


def plain_ranks(scores: torch.Tensor, matches: list[list[int]]) -> list[int]:
    """Returns ranks by definition: the number of wrong candidates that score at least as high as the best match."""
    ranks = []
    for row, columns in zip(scores.tolist(), matches, strict=True):
        best = max(row[column] for column in columns)
        ranks.append(sum(score >= best for column, score in enumerate(row) if column not in columns))
    return ranks


@settings(max_examples=60, deadline=None)
@given(
    queries=SIZES,
    candidates=SIZES,
    block=st.sampled_from([1, 10, 1 << 24]),
    num_ranks=st.integers(1, 3),
    data=st.data(),
)
def test_equals_the_definition(queries: int, candidates: int, block: int, num_ranks: int, data: st.DataObject) -> None:
    own = st.lists(st.integers(0, candidates - 1), min_size=1, max_size=3)
    matches = data.draw(st.lists(own, min_size=queries, max_size=queries))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    # Few values, so that there are many ties.
    query = torch.randint(-1, 2, (queries, 3), generator=generator).float()
    candidate = torch.randint(-1, 2, (candidates, 3), generator=generator).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall_module, "_BLOCK_ELEMENTS", block)
        parts = [match_ranks(query, candidate, matches, rank, num_ranks) for rank in range(num_ranks)]
    assert torch.stack(parts).amax(0).tolist() == plain_ranks(query @ candidate.T, matches)


def test_both_directions_with_several_captions() -> None:
    image = torch.eye(2)
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])  # texts 0 and 1 belong to image 0
    assert match_ranks(image, text, [[0, 1], [2]]).tolist() == [0, 0]  # catches the second caption counted against
    assert match_ranks(text, image, [[0], [0], [1]]).tolist() == [0, 1, 0]


def test_a_model_that_scores_everything_alike_finds_nothing() -> None:
    same = torch.ones(20, 4) / 2
    ranks = match_ranks(same, same, [[number] for number in range(20)])
    assert recall(ranks, "image_to_text") == {f"image_to_text@{level}": 0.0 for level in (1, 5, 10)}
    nothing = match_ranks(same * torch.nan, same, [[number] for number in range(20)])
    assert nothing.tolist() == [19] * 20  # catches a diverged model with a recall of one


def test_rounding_makes_ties() -> None:
    query, candidate = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0], [0.5 - 2e-7, 0.0], [0.4, 0.0]])
    assert match_ranks(query, candidate, [[0]]).tolist() == [1]


def test_recall_counts_ranks() -> None:
    assert recall(torch.tensor([0, 1, 4, 5, 9, 10]), "r") == {"r@1": 1 / 6, "r@5": 3 / 6, "r@10": 5 / 6}
