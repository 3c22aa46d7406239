"""Compares the division of layers into model chunks with all possible divisions."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from beit3_ds.pipeline.stages import cut, cut_layers, stage_layers
from beit3_ds.tasks import build_task
from tests.training.steps import config_for


@st.composite
def costs_and_chunks(draw: st.DrawFn) -> tuple[list[float], int]:
    costs = draw(st.lists(st.floats(0, 100) | st.integers(0, 3).map(float), min_size=1, max_size=8))
    return costs, draw(st.integers(1, len(costs)))


@settings(deadline=None)
@given(costs_and_chunks())
@example(([8, 11, 7, 6, 9, 3], 3))  # the most even cut, 19 + 13 + 12, does not have the smallest maximum, 18
def test_cut_is_the_best_of_all(drawn: tuple[list[float], int]) -> None:
    """Checks that no other division has a smaller largest sum, or an equal largest sum with more even sums."""
    costs, num_chunks = drawn
    chunks = cut(costs, num_chunks)
    assert len(chunks) == num_chunks and [i for chunk in chunks for i in chunk] == list(range(len(costs)))
    assert all(len(chunk) for chunk in chunks)

    def sums(borders: tuple[int, ...]) -> list[float]:
        return [sum(costs[a:b]) for a, b in itertools.pairwise((0, *borders, len(costs)))]

    every = [sums(borders) for borders in itertools.combinations(range(1, len(costs)), num_chunks - 1)]
    own = sums(tuple(chunk.start for chunk in chunks[1:]))
    best = min(map(max, every))
    assert max(own) <= best * (1 + 1e-8) + 1e-9
    evenest = min(sum(x * x for x in each) for each in every if max(each) <= best)
    assert sum(x * x for x in own) <= evenest * (1 + 1e-8) + 1e-9


@given(st.integers(1, 8), st.integers(1, 3))
def test_stages_take_turns(num_stages: int, num_chunks: int) -> None:
    """Checks that chunk r of stage s has index r * stages + s, so a stage's chunks are not consecutive."""
    chunks = [range(i, i + 1) for i in range(num_stages * num_chunks)]
    held = [stage_layers(chunks, stage, num_stages) for stage in range(num_stages)]
    assert [held[s][r] for r in range(num_chunks) for s in range(num_stages)] == chunks


@pytest.mark.parametrize(("stages", "virtual"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2)])
def test_small_model_is_cut_whole(stages: int, virtual: int) -> None:
    config = config_for(0, pipeline_parallel_size=stages, virtual_pipeline_parallel_size=virtual)
    chunks = cut_layers(config, build_task(config).expected_head_flops())
    assert len(chunks) == stages * virtual
    assert [layer for chunk in chunks for layer in chunk] == list(range(config.model.num_layers + 2))
