"""Tests the table of a checkpoint's pieces: its entries, who reads it, and that gaps and overlaps are found."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from beit3_ds.checkpoint import folder as checkpoint_folder
from beit3_ds.checkpoint.folder import CheckpointFolder, checkpoint_name
from beit3_ds.checkpoint.index import INDEX_NAME, PIECES_FILE, BrokenIndexError, read_index
from beit3_ds.checkpoint.pieces import Piece, PieceTable, check_cover, read_pieces
from beit3_ds.checkpoint.slices import TensorSlice, slice_range, whole_slice
from tests.checkpoint.small_state import SmallRun, check_holds


def slices() -> st.SearchStrategy[TensorSlice]:
    """Generates slices of a 3 x 3 matrix; some are empty, reversed or out of bounds."""
    bound = st.integers(-1, 4)
    return st.builds(TensorSlice, bound, bound, bound, bound)


def whole_cuts() -> st.SearchStrategy[list[TensorSlice]]:
    """Generates complete divisions of a 3 x 3 matrix into the slices of ZeRO ranks."""
    cuts = st.sets(st.integers(1, 8)).map(lambda inner: sorted({0, 9} | inner))
    return cuts.map(
        lambda bounds: [
            part
            for start, stop in itertools.pairwise(bounds)
            for _, part in slice_range(TensorSlice(0, 3, 0, 3), start, stop)
        ]
    )


@st.composite
def nearly_whole(draw: st.DrawFn) -> list[TensorSlice]:
    """Generates a complete division in which slices may be replaced, repeated or missing."""
    parts = draw(whole_cuts())
    for _ in range(draw(st.integers(0, 2))):
        index = draw(st.integers(0, len(parts)))
        parts[index : index + 1] = draw(
            st.lists(slices() | st.sampled_from(parts or [TensorSlice(0, 1, 0, 1)]), max_size=2)
        )
    return parts


def covers_once(parts: list[TensorSlice]) -> bool:
    """Returns whether slices cover each element of a 3 x 3 matrix exactly once, counting every element."""
    counts = np.zeros((3, 3), dtype=int)
    for top, bottom, left, right in parts:
        if not (0 <= top < bottom <= 3 and 0 <= left < right <= 3):
            return False
        counts[top:bottom, left:right] += 1
    return bool((counts == 1).all())


def table_of(parts: list[TensorSlice], name: str = "w") -> PieceTable:
    return PieceTable.build((name, Piece(rank, part)) for rank, part in enumerate(parts))


@given(nearly_whole() | st.lists(slices(), min_size=1, max_size=4))
@settings(deadline=None, max_examples=150)
@example([TensorSlice(0, 3, 0, 3)] * 3)  # an odd number of times
def test_gaps_overlaps_and_slices_outside_are_found(parts: list[TensorSlice]) -> None:
    table = table_of(parts) if parts else PieceTable({"w": 0}, np.zeros((0, 5), dtype=np.int64))
    if covers_once(parts):
        check_cover({"w": torch.Size((3, 3))}, table)
    else:
        with pytest.raises(BrokenIndexError, match="the pieces of w do not cover it once"):
            check_cover({"w": torch.Size((3, 3))}, table)


@pytest.mark.parametrize("shape", [(2**62, 4), (2**31, 2**32), (2**63 - 1,)])
def test_a_tensor_larger_than_any_file_is_refused(shape: tuple[int, ...]) -> None:
    """Catches sums and indices that overflow and then look valid."""
    table = table_of([TensorSlice(0, shape[0], 0, 1)])
    with pytest.raises((BrokenIndexError, RuntimeError)):
        check_cover({"w": torch.Size(shape)}, table)


@given(whole_cuts(), slices().filter(lambda part: part.top < part.bottom and part.left < part.right))
@settings(deadline=None)
def test_pieces_that_overlap_a_slice_are_listed(parts: list[TensorSlice], wanted: TensorSlice) -> None:
    expected = [Piece(rank, part) for rank, part in enumerate(parts) if part.intersection(wanted)]
    assert list(table_of(parts).overlapping("w", wanted)) == expected


def test_joined_tables_list_each_tensor_by_rank() -> None:
    """Checks joined tables of ranks that hold different tensors in different orders, as pipeline stages do."""
    first = PieceTable.build([("z", Piece(0, TensorSlice(0, 1, 0, 1))), ("a", Piece(0, TensorSlice(0, 2, 0, 1)))])
    second = PieceTable.build([("b", Piece(1, TensorSlice(0, 4, 0, 1))), ("z", Piece(1, TensorSlice(1, 3, 0, 1)))])
    joined = PieceTable.join([first, second])
    assert list(joined.counts.items()) == [("a", 1), ("b", 1), ("z", 2)]
    assert joined.rows_of("z").tolist() == [[0, 0, 1, 0, 1], [1, 1, 3, 0, 1]]
    assert joined.rows_of("b").tolist() == [[1, 0, 4, 0, 1]]


@pytest.fixture
def saved(tmp_path: Path, lone_rank: None) -> Path:
    """Saves a checkpoint; returns its folder."""
    assert SmallRun(tmp_path / "c").save(3) == [None]
    return tmp_path / "c" / checkpoint_name(3)


def test_the_table_is_read_as_written(saved: Path) -> None:
    index = read_index(saved)
    table = read_pieces(saved, index)
    assert table.counts == index.num_pieces == dict.fromkeys(sorted(index.shapes), 1)
    for name, shape in index.shapes.items():
        assert list(table.overlapping(name, whole_slice(shape))) == [Piece(0, whole_slice(shape))]


def to_format_1(folder: Path) -> None:
    """Rewrites a checkpoint in the format of version 0.1, in which the index holds the pieces."""
    pieces = read_pieces(folder, read_index(folder))
    content: dict[str, Any] = json.loads((folder / INDEX_NAME).read_text())
    del content["sha256"], content["files"][PIECES_FILE]
    content["version"] = 1
    for name, tensor in content["tensors"].items():
        tensor["pieces"] = pieces.rows_of(name).tolist()
    content["sha256"] = hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
    (folder / INDEX_NAME).write_text(json.dumps(content))
    (folder / PIECES_FILE).unlink()


def test_format_1_is_read(saved: Path) -> None:
    to_format_1(saved)
    assert read_index(saved).num_pieces == dict.fromkeys(sorted(read_index(saved).shapes), 1)
    check_holds(saved, 3)
    assert SmallRun(saved.parent).resume() == 3


@pytest.mark.parametrize(
    "piece", [[0, 0, 5, 0, True], [0, 0, 5, 0, 1.0], [0, 0, 5, 0], "01010", {"a": 1}, [0, 0, 4, 0, 1], [-1, 0, 5, 0, 1]]
)
def test_invalid_pieces_of_format_1_are_found(saved: Path, piece: Any) -> None:
    to_format_1(saved)
    content = json.loads((saved / INDEX_NAME).read_text())
    del content["sha256"]
    content["tensors"]["norm.weight"]["pieces"] = [piece]
    content["sha256"] = hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
    (saved / INDEX_NAME).write_text(json.dumps(content))
    with pytest.raises(BrokenIndexError, match="piece"):
        CheckpointFolder(saved)


def test_pruning_reads_no_table(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a save that reads the pieces of every kept checkpoint, which takes a second each at 512 ranks."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("a table was read")

    monkeypatch.setattr(checkpoint_folder, "read_pieces", refuse)
    run = SmallRun(saved.parent, keep=1)
    assert run.save(4, 5) == [None, None]
    assert run.store.newest_path() == saved.parent / checkpoint_name(5)
    assert [path.name for path in saved.parent.glob("step-*")] == [checkpoint_name(5)]
