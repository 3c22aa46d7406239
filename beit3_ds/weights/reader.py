"""Opens a model's weights on disk: a training checkpoint, exported weights, or a released file."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from beit3_ds.checkpoint.folder import best_checkpoint_path, is_checkpoint, open_checkpoint
from beit3_ds.checkpoint.slices import TensorSlice
from beit3_ds.config import ConfigError, ModelConfig
from beit3_ds.model.adaptation import StoredWeights
from beit3_ds.model.pretrained import PretrainedWeights, is_pretrained_file
from beit3_ds.untrusted_file import read_tensors_with_note
from beit3_ds.weights.export_note import NOTE_KEY, parse_note
from beit3_ds.weights.released import ReleasedFile
from beit3_ds.weights.timm_file import TimmFile
from beit3_ds.weights.unilm_heads import HEAD_EXTRAS


class WeightReader(Protocol):
    """Interface for reading a model's tensors from disk, one at a time."""

    @property
    def model(self) -> ModelConfig:
        """Returns the configuration of the model."""
        ...

    @property
    def step(self) -> int:
        """Returns the number of training steps before the weights were saved; 0 if unknown."""
        ...

    @property
    def task(self) -> Mapping[str, Any] | None:
        """Returns the name and settings of the head's task, in the form of `Task.describe`; None if unknown."""
        ...

    def names(self) -> list[str]:
        """Returns this project's names of all tensors, such as `blocks.3.ffn.fc1.weight_vision`.

        A matrix that the word embedding and the MLM head share appears once, as `embeddings.word.weight`. Names with
        the prefix `EXTRA_PREFIX` are in the list too; these tensors do not belong to the model.
        """
        ...

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor."""
        ...

    def read(self, name: str, part: TensorSlice | None = None) -> Tensor:
        """Returns a whole tensor. With `part`, views the tensor as a matrix, and returns only the rows and columns that
        `part` selects.
        """
        ...


class OpenedWeights(WeightReader, StoredWeights, Protocol):
    """Interface of opened weights from which a model can be loaded."""


class Backbone:
    """Reads all weights except those of task heads, for a run with another task.

    Attributes:
        model: configuration of the model.
        step: number of training steps before the weights were saved.
        task: None, because there is no head.
    """

    task = None

    def __init__(self, reader: WeightReader) -> None:
        """Selects all tensors of a reader except those of task heads (`heads.*` and `unilm_heads.HEAD_EXTRAS`)."""
        self.model, self.step = reader.model, reader.step
        self.shape, self.dtype, self.read = reader.shape, reader.dtype, reader.read
        self._names = [name for name in reader.names() if not name.startswith("heads.") and name not in HEAD_EXTRAS]

    def names(self) -> list[str]:
        """Returns the names of all tensors except those of task heads."""
        return list(self._names)


class WithoutTensors:
    """Reads weights without the head tensors that the user leaves out.

    A run of the same task can start from these weights. It gives the left-out tensors initial values.

    Attributes:
        model: configuration of the model.
        step: number of training steps before the weights were saved.
        task: name and settings of the head's task.
    """

    def __init__(self, reader: WeightReader, patterns: Sequence[str]) -> None:
        """Selects all tensors of a reader except head tensors that match a pattern.

        Args:
            reader: the weights.
            patterns: patterns of tensor names, such as `heads.boxes.stages.*.classes.*`; `*` matches any characters.

        Raises:
            ConfigError: if a pattern matches no tensor, or if it matches a tensor outside the head.
        """
        self.model, self.step, self.task = reader.model, reader.step, reader.task
        self.shape, self.dtype, self.read = reader.shape, reader.dtype, reader.read
        names = reader.names()
        for pattern in patterns:
            found = [name for name in names if fnmatchcase(name, pattern)]
            if not found or not all(name.startswith("heads.") for name in found):
                which = f"matches {found[0]}, outside of the head" if found else "matches no tensor"
                raise ConfigError(
                    f"--leave-out {pattern!r} {which}. Patterns match whole names of the head's tensors, such as "
                    "'heads.boxes.stages.*.classes.*'; `beit3 inspect` lists the names."
                )
        self._names = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]

    def names(self) -> list[str]:
        """Returns the names of all tensors that are not left out."""
        return list(self._names)


def open_weights(path: str | Path, *, averages: bool = False, best: bool = False) -> OpenedWeights:
    """Opens a checkpoint, the newest checkpoint of a run, exported weights, or a released file.

    Args:
        path: path of the file or folder.
        averages: whether to read the moving averages in a checkpoint (`training.ema_decay`) instead of the weights.
        best: whether to open the best checkpoint of a run (`training.best_metric`) instead of the newest.

    Raises:
        ConfigError: if the path contains no weights, if the checkpoint is incomplete or damaged, or if the requested
            averages or best checkpoint do not exist.
    """
    path = Path(path)
    if is_checkpoint(path):
        return open_checkpoint(best_checkpoint_path(path) if best else path, averages=averages)
    if averages or best:
        raise ConfigError(
            f"{path} is not a checkpoint, so it has no averages and no best checkpoint. Leave out --ema and --best."
        )
    if path.is_file() and not is_pretrained_file(path):
        return open_for_import(path)
    return PretrainedWeights(path)


def open_for_import(path: str | Path, *, image_size: int | None = None) -> ReleasedFile | TimmFile:
    """Opens a weights file in the format of unilm or timm.

    The file may come from these projects, or may have been exported by this program.

    Args:
        path: path of the file.
        image_size: side of the images in pixels; position embeddings are interpolated to this size. None keeps the
            image size of the file's model.

    Raises:
        ConfigError: if the file cannot be read, contains objects that could run code, or has an unknown format.
    """
    tensors, text = read_tensors_with_note(path, NOTE_KEY)
    note = parse_note(text, str(path)) if text else None
    if note is not None and note.format == "timm":
        return TimmFile(path, tensors, note, image_size=image_size)
    return ReleasedFile(path, image_size=image_size)
