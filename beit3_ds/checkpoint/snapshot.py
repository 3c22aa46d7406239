"""Copies this rank's training state to host memory, so that training continues during a save."""

from pathlib import Path

import torch
from torch import Tensor

from beit3_ds.checkpoint.engine_state import EngineState
from beit3_ds.checkpoint.index import BUFFERS, FILE_KINDS, StoredBuffer, file_name, tensor_key
from beit3_ds.checkpoint.pieces import Piece, PieceTable
from beit3_ds.checkpoint.slices import TensorSlice
from beit3_ds.checkpoint.tensor_file import TensorEntry, WrittenFile, write_tensor_file


class Snapshot:
    """Copy of this rank's share of the weights, moments and averages. Every save reuses the same memory.

    The copy needs 12 bytes per element that the rank saves, or 16 bytes with averages. If the engine computes on a GPU,
    the memory is page-locked.
    """

    def __init__(self, state: EngineState) -> None:
        self._state, self._num_elements = state, state.num_elements_to_save()
        self._memory: dict[str, Tensor] = {}
        self._pieces: list[tuple[str, TensorSlice, int]] = []
        self._buffers: dict[str, Tensor] = {}
        self.optimizer_step = 0
        """AdamW's count of updates when the state was copied."""

    def reserve_memory(self) -> None:
        """Allocates the memory and fills it with zeros, so that the first copy is fast."""
        if not self._memory:
            pin = self._state.is_on_gpu
            self._memory = {kind: torch.empty(self._num_elements, pin_memory=pin).zero_() for kind in self._state.kinds}

    def copy_state(self) -> None:
        """Copies the engine's current state to host memory; returns when the copy is complete."""
        self._pieces, position = [], 0
        for fragment in self._state.fragments_to_save():
            length = len(fragment.weight)
            for kind in self._state.kinds:
                self._memory[kind][position : position + length].copy_(fragment.values(kind), non_blocking=True)
            for start, part in self._state.slices(fragment):
                self._pieces.append((fragment.name, part, position + start))
            position += length
        self._buffers = {name: buffer.to("cpu", copy=True) for name, buffer in self._state.buffers_to_save().items()}
        self.optimizer_step = self._state.optimizer_step
        if self._state.is_on_gpu:
            torch.cuda.synchronize()

    def shapes(self) -> dict[str, torch.Size]:
        """Maps tensor names to shapes of whole tensors, for each tensor of which this rank saves a slice."""
        return {name: self._state.local_tensors[name].shape for name, _, _ in self._pieces}

    def pieces(self, rank: int) -> PieceTable:
        """Returns the table of the tensor slices that this rank saves.

        Args:
            rank: global rank of this process.
        """
        return PieceTable.build((name, Piece(rank, part)) for name, part, _ in self._pieces)

    def buffers(self, rank: int) -> dict[str, StoredBuffer]:
        """Returns descriptions of the buffers that this rank saves, by name.

        Args:
            rank: global rank of this process.
        """
        return {
            name: StoredBuffer(rank, str(buffer.dtype).removeprefix("torch."), tuple(buffer.shape))
            for name, buffer in self._buffers.items()
        }

    def write(self, folder: Path, rank: int) -> dict[str, WrittenFile]:
        """Writes this rank's files into an existing folder and syncs them.

        Args:
            folder: folder of the checkpoint.
            rank: global rank of this process.

        Returns:
            Size and digest of each file, by name.

        Raises:
            OSError: if the disk is full or cannot be written.
        """
        written = {}
        for file_kind, kinds in FILE_KINDS.items():
            if not set(kinds) <= set(self._state.kinds):
                continue
            places = {
                tensor_key(kind, name, part): (kind, part, position)
                for name, part, position in self._pieces
                for kind in kinds
            }
            entries = [TensorEntry(key, torch.float32, part.shape) for key, (_, part, _) in places.items()]

            def read(key: str, places: dict[str, tuple[str, TensorSlice, int]] = places) -> list[Tensor]:
                kind, part, position = places[key]
                return [self._memory[kind][position : position + part.num_elements]]

            name = file_name(file_kind, rank)
            written[name] = write_tensor_file(folder / name, entries, read, {"format": "pt"})
        if self._buffers:
            name = file_name(BUFFERS, rank)
            entries = [TensorEntry(key, buffer.dtype, buffer.shape) for key, buffer in self._buffers.items()]
            written[name] = write_tensor_file(
                folder / name, entries, lambda key: [self._buffers[key]], {"format": "pt"}
            )
        return written
