"""Tests the search in blocks for the best candidates."""

import pytest
import torch

from beit3_ds.tasks.retrieval import neighbours
from beit3_ds.tasks.retrieval.neighbours import best_candidates


@pytest.mark.parametrize("elements", [1, 50, 1 << 24])
def test_blocks_find_what_the_whole_matrix_has(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK_ELEMENTS", elements)
    queries, candidates = torch.randn(7, 4), torch.randn(11, 4)
    numbers, scores = best_candidates(queries, candidates, 3)
    expected = (queries @ candidates.t()).topk(3, dim=1)
    assert torch.equal(numbers, expected.indices)
    torch.testing.assert_close(scores, expected.values)


def test_there_may_be_fewer_candidates() -> None:
    numbers, _ = best_candidates(torch.randn(2, 4), torch.randn(3, 4), 10)
    assert numbers.shape == (2, 3)
    assert best_candidates(torch.randn(0, 4), torch.randn(3, 4), 10)[0].shape == (0, 3)
