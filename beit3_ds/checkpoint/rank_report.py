"""Describes what one rank has saved, for the main rank, which writes the index of the checkpoint."""

import json
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_ds.checkpoint.index import StoredBuffer
from beit3_ds.checkpoint.pieces import PieceTable
from beit3_ds.checkpoint.tensor_file import WrittenFile


class RankReport(NamedTuple):
    """One rank's report about the files that it wrote for a checkpoint."""

    error: str | None
    """One-line error message; None if the rank wrote all its files."""
    files: dict[str, WrittenFile]
    """Size and digest of each file that the rank wrote, by name."""
    shapes: dict[str, torch.Size]
    """Shapes of whole tensors by tensor name, for the tensors of which this rank wrote a slice."""
    pieces: PieceTable
    """Table of the tensor slices that the rank wrote."""
    buffers: dict[str, StoredBuffer]
    """Buffers that the rank wrote, by name."""

    def to_plain(self) -> tuple[str, Tensor, str]:
        """Returns the report in a form that ranks can send.

        Returns:
            The shapes as JSON, the rows of the table `pieces` as a tensor, and all other fields as JSON.
        """
        rest = [self.error, self.files, list(self.pieces.counts.values()), self.buffers]
        shapes = {name: self.shapes[name] for name in self.pieces.counts}
        return _to_json(shapes), torch.from_numpy(self.pieces.rows), _to_json(rest)

    @classmethod
    def from_plain(cls, shapes: str, rows: Tensor, rest: str) -> "RankReport":
        """Rebuilds a report from the result of `to_plain`."""
        error, files, counts, buffers = json.loads(rest)
        parsed = _parse_shapes(shapes)
        return cls(
            error,
            {name: WrittenFile(*file) for name, file in files.items()},
            parsed,
            PieceTable(dict(zip(parsed, counts, strict=True)), rows.numpy()),
            {name: StoredBuffer(rank, dtype, tuple(shape)) for name, (rank, dtype, shape) in buffers.items()},
        )


@lru_cache(maxsize=64)  # under ZeRO-3 the ranks of a pipeline stage send the same text
def _parse_shapes(text: str) -> dict[str, torch.Size]:
    return {name: torch.Size(shape) for name, shape in json.loads(text).items()}


def _to_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
