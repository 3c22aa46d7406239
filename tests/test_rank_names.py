"""Tests that a set of ranks is printed as ranges."""

from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.rank_names import join_ranks


def test_spans() -> None:
    assert [join_ranks(ranks) for ranks in ([3], [0, 1], [5, 0, 2, 1])] == ["rank 3", "ranks 0-1", "ranks 0-2, 5"]


@given(st.sets(st.integers(0, 30), min_size=1))
def test_no_rank_is_lost(ranks: set[int]) -> None:
    word, spans = join_ranks(ranks).split(" ", 1)
    named = []
    for span in spans.split(", "):
        first, _, last = span.partition("-")
        named += range(int(first), int(last or first) + 1)
    assert named == sorted(ranks) and word == ("rank" if len(ranks) == 1 else "ranks")
