"""Tests that loading needs little memory beside the engine's tensors, and copies every element to its place."""

import itertools
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from beit3_ds.checkpoint.engine_state import EngineState
from beit3_ds.checkpoint.folder import CheckpointFolder
from beit3_ds.checkpoint.index import (
    FILE_KINDS,
    INDEX_NAME,
    KINDS,
    MOMENTS,
    PIECES_FILE,
    WEIGHT,
    Index,
    file_name,
    tensor_key,
)
from beit3_ds.checkpoint.pieces import Piece, PieceTable, write_pieces
from beit3_ds.checkpoint.slices import TensorSlice
from beit3_ds.checkpoint.tensor_file import TensorEntry, write_tensor_file
from beit3_ds.parallel import Mesh, Split
from tests.checkpoint.small_state import describe

NAME = "weight"
FLOAT_BYTES = 4


class PeakBytes(TorchDispatchMode):
    """Tracks the bytes of all storages that operations in a `with` block allocate.

    Attributes:
        peak: largest number of bytes that existed at the same time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in args if isinstance(tensor, Tensor)}
        if isinstance(result, Tensor) and id(result.untyped_storage()) not in given:
            self._live[StorageWeakRef(result.untyped_storage())] = result.untyped_storage().nbytes()
        self._live = {ref: size for ref, size in self._live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._live.values()))
        return result


class Parts(NamedTuple):
    """Describes how tensor parallelism divides a matrix: along dimension `dim`, at the indices `bounds`."""

    dim: int
    bounds: tuple[int, ...]

    def slices(self, shape: tuple[int, int]) -> list[TensorSlice]:
        """Returns the slice of every rank."""
        pairs = itertools.pairwise(self.bounds)
        if self.dim == 0:
            return [TensorSlice(start, stop, 0, shape[1]) for start, stop in pairs]
        return [TensorSlice(0, shape[0], start, stop) for start, stop in pairs]


@st.composite
def parts(draw: st.DrawFn, shape: tuple[int, int]) -> Parts:
    dim = draw(st.integers(0, 1))
    inner = draw(st.sets(st.integers(1, shape[dim]), max_size=3))
    return Parts(dim, tuple(sorted({0, shape[dim]} | inner)))


def values_of(kind: str, shape: tuple[int, int]) -> Tensor:
    """Returns the values of an undivided tensor; all elements differ."""
    count = shape[0] * shape[1]
    return torch.arange(count * KINDS.index(kind), count * (KINDS.index(kind) + 1)).float().view(shape)


def write_checkpoint(folder: Path, shape: tuple[int, int], written: Parts) -> None:
    """Writes a checkpoint of one tensor, with one piece per rank."""
    pieces = [Piece(rank, part) for rank, part in enumerate(written.slices(shape))]
    files = {}
    for rank, part in pieces:
        for file_kind in ("weights", "moments"):
            values = {tensor_key(kind, NAME, part): values_of(kind, shape) for kind in FILE_KINDS[file_kind]}
            of_rank = {key: whole[part.top : part.bottom, part.left : part.right] for key, whole in values.items()}
            entries = [TensorEntry(key, torch.float32, part.shape) for key in of_rank]
            name = file_name(file_kind, rank)
            files[name] = write_tensor_file(
                folder / name, entries, lambda key, of_rank=of_rank: [of_rank[key]], {}, with_digest=False
            )
    table = PieceTable.build((NAME, piece) for piece in pieces)
    files[PIECES_FILE] = write_pieces(folder, table)
    index = Index(
        step=1,
        optimizer_step=1,
        run=describe(),
        shapes={NAME: torch.Size(shape)},
        num_pieces=table.counts,
        files=files,
    )
    (folder / INDEX_NAME).write_bytes(index.to_json())


def build_state(shape: tuple[int, int], read: Parts, rank: int) -> tuple[EngineState, dict[str, Tensor]]:
    """Returns the state of one rank without ZeRO, and the rank's tensors by kind."""
    part = read.slices(shape)[rank]
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(part.shape))
    split = Split(dim=read.dim, start=read.bounds[rank], stop=read.bounds[rank + 1], size=shape[read.dim])
    module.weight.parallel_split = split  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(module.parameters())
    moments = {kind: torch.zeros(part.shape) for kind in MOMENTS}
    optimizer.state[module.weight] = {"step": torch.zeros(()), **moments}
    engine: Any = SimpleNamespace(module=module, optimizer=optimizer, device=torch.device("cpu"))
    return EngineState(engine, Mesh()), {WEIGHT: module.weight.data, **moments}


@given(st.data(), st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(1, 200))
@settings(deadline=None, max_examples=25)
def test_memory_is_bounded_by_blocks(data: st.DataObject, shape: tuple[int, int], block: int) -> None:
    """Catches a load that reads whole pieces: for a large vocabulary, that took 2.5 times the table's size."""
    written, read = data.draw(parts(shape)), data.draw(parts(shape))
    rank = data.draw(st.integers(0, len(read.bounds) - 2))
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("beit3_ds.checkpoint.engine_state.BLOCK_ELEMENTS", block),
        mock.patch("beit3_ds.checkpoint.folder.BLOCK_ELEMENTS", block),
    ):
        write_checkpoint(Path(folder), shape, written)
        state, tensors = build_state(shape, read, rank)
        checkpoint = CheckpointFolder(Path(folder))
        with PeakBytes() as memory:
            state.load(checkpoint.read_kind, checkpoint.index.optimizer_step)
        checkpoint.close()
    part = read.slices(shape)[rank]
    for kind, values in tensors.items():
        assert torch.equal(values, values_of(kind, shape)[part.top : part.bottom, part.left : part.right])
    widest = max(piece.shape[1] for piece in written.slices(shape))  # whole rows of a piece are read
    assert 0 < memory.peak <= FLOAT_BYTES * (block + max(block, widest))
