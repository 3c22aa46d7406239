"""Tests how a vocabulary is divided into tiles."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from beit3_ds.kernels.ops.vocabulary_tiles import ALIGNMENT, CPU_WIDTH, divide_for_cpu, divide_for_gpu

sizes = {
    "num_rows": st.integers(0, 3000),
    "vocabulary": st.integers(1, 70_000),
    "chunk_size": st.none() | st.integers(1, 1000),
}


@given(**sizes)
@example(num_rows=350, vocabulary=64010, chunk_size=128)
def test_tiles_cover_the_vocabulary_within_their_room(num_rows: int, vocabulary: int, chunk_size: int | None) -> None:
    for divide, beside in ((divide_for_cpu, 1), (divide_for_gpu, 0)):
        tiles = divide(num_rows, vocabulary, chunk_size)
        assert tiles.columns[0].start == 0 and tiles.columns[-1].stop == vocabulary
        assert all(a.stop == b.start for a, b in zip(tiles.columns, tiles.columns[1:], strict=False))
        widths = [columns.stop - columns.start for columns in tiles.columns]
        assert max(widths) == widths[0] <= tiles.stride
        assert 1 <= tiles.num_buffers <= len(widths)
        room = vocabulary if chunk_size is None else chunk_size * vocabulary // max(1, num_rows)
        if chunk_size is not None and room > 1:  # narrower than one column a tile cannot be
            assert (tiles.num_buffers + (beside if len(widths) > 1 else 0)) * widths[0] <= room


@given(**sizes)
def test_what_is_kept(num_rows: int, vocabulary: int, chunk_size: int | None) -> None:
    """Catches a buffer that two kept tiles share."""
    for divide in (divide_for_cpu, divide_for_gpu):
        tiles = divide(num_rows, vocabulary, chunk_size)
        last_in = {tiles.buffer(index): index for index in range(len(tiles.columns))}
        assert sorted(last_in.values()) == [i for i in range(len(tiles.columns)) if tiles.is_kept(i)]
        assert len(last_in) == tiles.num_buffers


def test_all_are_kept_without_a_chunk_size() -> None:
    assert divide_for_cpu(620, 8192, None).num_buffers == 8192 // CPU_WIDTH
    assert len(divide_for_gpu(620, 8192, None).columns) == 1


@pytest.mark.parametrize("vocabulary", [64010, 8192, 100, 64])
def test_rows_are_aligned_on_a_gpu(vocabulary: int) -> None:
    for chunk_size in (None, 128, 1000):
        tiles = divide_for_gpu(350, vocabulary, chunk_size)
        assert tiles.stride % ALIGNMENT == 0
        assert all(columns.start % ALIGNMENT == 0 for columns in tiles.columns) or tiles.stride == ALIGNMENT
