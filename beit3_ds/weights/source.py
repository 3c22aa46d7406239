"""Where a model's tensors come from: a training checkpoint, exported weights, or a released file."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from beit3_ds.checkpoint.folder import is_checkpoint, open_checkpoint
from beit3_ds.checkpoint.slices import TensorSlice
from beit3_ds.config import ModelConfig
from beit3_ds.model.pretrained import PretrainedWeights, is_pretrained_file
from beit3_ds.untrusted_file import read_tensors_with_note
from beit3_ds.weights.export_note import NOTE_KEY, parse_note
from beit3_ds.weights.released import ReleasedFile
from beit3_ds.weights.timm_file import TimmFile


class TensorSource(Protocol):
    """A model's logical tensors on disk, read one at a time."""

    @property
    def model(self) -> ModelConfig:
        """The model's configuration."""
        ...

    @property
    def step(self) -> int:
        """Updates that made the tensors; 0 if unknown."""
        ...

    def names(self) -> list[str]:
        """Logical names, `blocks.3.ffn.fc1.weight_vision`; a tied matrix once, as `embeddings.word.weight`.

        Those under `EXTRA_PREFIX` are none of the model's.
        """
        ...

    def shape(self, name: str) -> torch.Size:
        """The logical shape of a tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The type that `read` gives."""
        ...

    def read(self, name: str, part: TensorSlice | None = None) -> Tensor:
        """A tensor as stored in its logical shape, or a part of it seen as a matrix, (rows, columns)."""
        ...


def open_source(path: str | Path) -> TensorSource:
    """Opens what lies at `path`: a checkpoint or the newest of a run, exported weights, or else a released file.

    Raises:
        ConfigError: if it is none of them, or a checkpoint that is torn or changed.
    """
    path = Path(path)
    if is_checkpoint(path):
        return open_checkpoint(path)
    if path.is_file() and not is_pretrained_file(path):
        return open_foreign(path)
    return PretrainedWeights(path)


def open_foreign(path: str | Path, *, image_size: int | None = None) -> ReleasedFile | TimmFile:
    """Opens a file in another project's layout: one that the reference released, or an export for other projects.

    Args:
        path: the file.
        image_size: pixels on a side, for which positions are interpolated; None keeps the file's size.

    Raises:
        ConfigError: if the file cannot be read, holds objects that could run code, or has an unknown layout.
    """
    tensors, text = read_tensors_with_note(path, NOTE_KEY)
    note = parse_note(text, str(path)) if text else None
    if note is not None and note.format == "timm":
        return TimmFile(path, tensors, note, image_size=image_size)
    return ReleasedFile(path, image_size=image_size)
