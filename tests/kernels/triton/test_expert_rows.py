"""Tests how the rows of experts are divided among programs."""

from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.kernels.triton.expert_rows_launch import choose_row_tiling, deal_rows


@given(lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=3), most=st.integers(4, 600))
def test_programs_run_at_once(lengths: list[int], most: int) -> None:
    """Catches more programs than can run at once, which double the time, and far too few, which idle processors."""
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    programs = deal_rows(stops, most)
    assert programs.num_programs == sum(-(-length // programs.rows) for length in lengths) <= most
    assert programs.rows == 1 or (programs.rows - 1) * (most - 3) < sum(lengths)
    assert programs.stops == (*stops, *[stops[-1]] * (3 - len(stops)))


def test_a_thread_holds_few_columns() -> None:
    for width in (24, 768, 1024, 1408, 3072, 4096, 6144, 8192):
        tiling = choose_row_tiling(90, width)
        assert width <= 16 * 32 * tiling.num_warps
        assert tiling.num_warps * tiling.backward_programs == 132 * 16  # what 132 multiprocessors hold at once
