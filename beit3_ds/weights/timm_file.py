"""Reads a vision tower that this program exported for timm, as tensors with this project's names."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from beit3_ds.config import ConfigError
from beit3_ds.model import initial_value
from beit3_ds.model.pretrained import IMAGE_POSITION, matrix_part
from beit3_ds.positions import interpolate_positions
from beit3_ds.tasks.pretraining.model import PretrainingModel
from beit3_ds.weights.export_note import ExportNote
from beit3_ds.weights.timm_names import timm_names


class TimmFile:
    """Reads a vision tower exported for timm; all other tensors of the model get their initial values.

    Attributes:
        path: path of the file.
        model: configuration of the exported model, with the requested image size.
        step: number of training steps before the weights were saved.
        task: None, because the file has no head.
        description: format of the file in words.
        held: this project's names of the tensors in the file; excludes tensors with initial values.
    """

    task = None
    description = "vision tower exported for timm"

    def __init__(
        self, path: str | Path, tensors: Mapping[str, Tensor], note: ExportNote, *, image_size: int | None = None
    ) -> None:
        """Renames and reshapes timm's tensors to this project's tensors.

        Args:
            path: path of the file.
            tensors: tensors of the file, by timm's names.
            note: the note that `beit3 export` stored in the file.
            image_size: side of the model's images in pixels. Position embeddings are interpolated to this size when
                they are read. None keeps the file's size.

        Raises:
            ConfigError: if the tensors do not match the model.
        """
        self.path, self.step = Path(path), note.step
        self.model = note.model
        if image_size is not None:
            self.model = dataclasses.replace(note.model, image_size=image_size)
        with torch.device("meta"):
            self._shapes = {
                name: parameter.shape for name, parameter in PretrainingModel(self.model).named_parameters()
            }
            stored = {name: parameter.shape for name, parameter in PretrainingModel(note.model).named_parameters()}
        self._tensors = dict(_by_logical_name(tensors, note, stored, str(path)))
        self._initial: tuple[str, Tensor] | None = None  # name and values of the last tensor that the file lacks
        self.held = list(self._tensors)

    def names(self) -> list[str]:
        """Returns this project's names of all tensors of the model."""
        return list(self._shapes)

    def shape(self, name: str) -> torch.Size:
        """Returns the shape that a tensor has in this project's model, which may differ from the shape in the file."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of the file's tensors; it is equal for all names."""
        return next(iter(self._tensors.values())).dtype

    def read(self, name: str, part: tuple[int, int, int, int] | None = None) -> Tensor:
        """Returns a tensor, or a part of the tensor.

        If the file lacks the tensor, returns the tensor's initial value for seed 0.

        Args:
            name: name of the tensor in this project.
            part: (top, bottom, left, right) selects rows [top, bottom) and columns [left, right) of the tensor, viewed
                as a matrix (`matrix_part`). None returns the whole tensor.
        """
        if name in self._tensors:
            tensor = self._tensors[name]
            if name == IMAGE_POSITION:
                tensor = interpolate_positions(tensor[None], self.model.grid_size)[0]
        else:
            if self._initial is None or self._initial[0] != name:
                self._initial = name, initial_value(name, self._shapes[name], self.model, 0).to(self.dtype(name))
            tensor = self._initial[1]
        return tensor if part is None else matrix_part(tensor, part)

    def release_pages(self) -> None:
        """Does nothing: the file's pages stay in memory, because a vision encoder uses almost all tensors."""


def _by_logical_name(
    tensors: Mapping[str, Tensor], note: ExportNote, shapes: Mapping[str, torch.Size], where: str
) -> Iterator[tuple[str, Tensor]]:
    wanted = timm_names(note.model)
    if wanted.keys() != tensors.keys():
        odd = sorted(wanted.keys() ^ tensors.keys())
        raise ConfigError(f"{where}: the tensors are not those of its export: {odd[0]}. Export it again.")
    for key, names in wanted.items():
        if tensors[key].numel() != sum(shapes[name].numel() for name in names):
            raise ConfigError(f"{where}: {key} has the shape {tuple(tensors[key].shape)}. Export it again.")
        parts = tensors[key].chunk(len(names)) if len(names) > 1 else [tensors[key]]
        for name, part in zip(names, parts, strict=True):
            yield name, part.reshape(shapes[name])
