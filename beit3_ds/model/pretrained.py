"""A model's weights as plain data: one safetensors file, or a folder of them with an index as Hugging Face's.

Tensors have their logical names; the header of every file holds the model's configuration.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from beit3_ds.config import ConfigError, ModelConfig
from beit3_ds.config.strict import load_section
from beit3_ds.model.renamed_tensors import stored_names
from beit3_ds.positions import interpolate_positions

INDEX_NAME = "model.safetensors.index.json"
"""File of a sharded folder that says which tensor is where."""
EXTRA_PREFIX = "released."
"""Tensors so named are none of the model's: imported files keep there what only their own project has a place for."""

IMAGE_POSITION = "embeddings.image_position"
"""The one tensor that depends on the size of images."""

REPLACEABLE = ("heads.", "norm.")
"""Beginnings of the names of tensors that fine-tuned models replace."""
_METADATA_KEY = "beit3_ds"
_FORMAT_VERSION = 1


class PretrainedWeights:
    """The tensors of exported or imported weights, read from disk when they are asked for.

    Attributes:
        path: the file or folder.
        model: the model's configuration, with the image size that was asked for.
        step: updates that made the weights; 0 if unknown.
    """

    def __init__(self, path: str | Path, *, image_size: int | None = None) -> None:
        """Reads names, shapes and configuration.

        Args:
            path: a .safetensors file, or a folder with an index.
            image_size: pixels on a side, for which positions are interpolated; None keeps the file's.

        Raises:
            ConfigError: if the weights cannot be read or are none of this project's.
        """
        self.path = Path(path)
        readers = [_open(file) for file in _weight_files(self.path)]
        self._places = {
            name: (reader, stored) for reader in readers for name, stored in stored_names(reader.keys()).items()
        }
        headers = {(reader.metadata() or {}).get(_METADATA_KEY) for reader in readers}
        if len(headers) > 1:
            raise ConfigError(f"{path}: its files belong to different exports. Export the weights again.")
        self.model, self.step = _parse_header(self.path, headers.pop())
        self._resized = image_size is not None
        if image_size is not None:
            self.model = dataclasses.replace(self.model, image_size=image_size)

    def names(self) -> list[str]:
        """Names of all tensors, those under `EXTRA_PREFIX` included."""
        return list(self._places)

    def shape(self, name: str) -> torch.Size:
        """The logical shape of a tensor."""
        return self.read(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor's elements on disk."""
        return self.read(name).dtype

    def read(self, name: str, part: tuple[int, int, int, int] | None = None) -> Tensor:
        """A tensor as stored, or a part of it; its pages are read from disk when it is used.

        Args:
            name: one of `names()`.
            part: rows [top, bottom) and columns [left, right) of the tensor seen as a matrix, as `matrix_part` has it;
                None is all of it in its logical shape.

        Raises:
            ConfigError: if there is no such tensor.
        """
        if name not in self._places:
            raise ConfigError(f"{self.path} has no tensor '{name}'. Export or import the weights again.")
        reader, stored = self._places[name]
        tensor = reader.get_tensor(stored)
        if name == IMAGE_POSITION and self._resized:
            tensor = interpolate_positions(tensor[None], self.model.grid_size)[0]
        return tensor if part is None else matrix_part(tensor, part)


def weights_metadata(model: ModelConfig, step: int) -> dict[str, str]:
    """What the header of every file of exported weights says."""
    header = {"format_version": _FORMAT_VERSION, "model": dataclasses.asdict(model), "step": step}
    return {_METADATA_KEY: json.dumps(header)}


def is_pretrained_file(file: Path) -> bool:
    """Whether a file's header is that of exported weights."""
    try:
        with safe_open(file, "pt") as reader:
            return _METADATA_KEY in (reader.metadata() or {})
    except (OSError, SafetensorError):
        return False


def matrix_part(tensor: Tensor, part: tuple[int, int, int, int]) -> Tensor:
    """Rows [top, bottom) and columns [left, right) of a tensor seen as a matrix, a view.

    The first dimension is the rows, the others together are the columns; a vector is one column.
    """
    top, bottom, left, right = part
    return tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1)[top:bottom, left:right]


def check_tensors(where: str, found: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> list[str]:
    """Compares a file's tensors with those of its model.

    Returns:
        Names of the final norm's and the heads' tensors that the file lacks: fine-tuned releases have other heads.
        Heads that the model lacks are ignored.

    Raises:
        ConfigError: if another tensor is missing, one is none of the model's, or a shape differs.
    """
    missing = [name for name in wanted if name not in found]
    absent = [name for name in missing if name.startswith(REPLACEABLE)]
    lost = [name for name in missing if name not in absent]
    unknown = [name for name in found if name not in wanted and not name.startswith("heads.")]
    if lost or unknown:
        raise ConfigError(
            f"{where}: the tensors are not those of the model: {len(lost)} are missing{_examples(lost)}, "
            f"{len(unknown)} are unknown{_examples(unknown)}. Export or import the weights again."
        )
    for name, shape in found.items():
        if shape != wanted.get(name, shape):
            raise ConfigError(
                f"{where}: {name} has the shape {tuple(shape)}, but its configuration asks for {tuple(wanted[name])}. "
                f"Export or import the weights again."
            )
    return absent


def _weight_files(path: Path) -> list[Path]:
    if not path.exists():
        raise ConfigError(f"there is no {path}. Name a file or folder that `beit3 export` or `beit3 import` wrote.")
    if path.is_file():
        return [path]
    if not (path / INDEX_NAME).is_file():
        if (path / "index.json").is_file():
            raise ConfigError(f"{path} is a checkpoint of a training run. Use `beit3 export {path} OUT.safetensors`.")
        raise ConfigError(f"the folder {path} holds no {INDEX_NAME}. Name a folder that `beit3 export` wrote.")
    try:
        weight_map = json.loads((path / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        return [path / name for name in sorted(set(weight_map.values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path / INDEX_NAME} cannot be read ({error!r}). Export the weights again.") from error


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{file} is not a readable safetensors file ({error}). Name a file that `beit3 export` or `beit3 import` "
            f"wrote; released .pth files go through `beit3 import` first."
        ) from error


def _parse_header(path: Path, text: str | None) -> tuple[ModelConfig, int]:
    if text is None:
        raise ConfigError(
            f"{path} holds tensors, but no configuration of this project's: another program wrote it. Convert released "
            f"weights with `beit3 import {path} OUT.safetensors`."
        )
    try:
        header = json.loads(text)
        version, model, step = header["format_version"], header["model"], int(header["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: its header cannot be read ({error!r}). Export the weights again.") from error
    if version != _FORMAT_VERSION:
        raise ConfigError(f"{path}: format version {version}, but this program reads {_FORMAT_VERSION}. Update it.")
    return load_section(ModelConfig, model, f"{path}: model"), step


def _examples(names: Iterable[str]) -> str:
    shown = ", ".join(list(names)[:3])
    return f" ({shown})" if shown else ""
