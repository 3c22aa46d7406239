"""Reads model weights from a safetensors file, or from a folder with several safetensors files and a Hugging Face
index.

Tensors are stored under their logical names. The header of each file contains the model's configuration.
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
from beit3_ds.regular_file import read_regular
from beit3_ds.safetensors_header import check_safetensors
from beit3_ds.untrusted_json import MAX_JSON_BYTES, check_count, check_object, check_text, parse_untrusted_json

INDEX_NAME = "model.safetensors.index.json"
"""Name of the index in a folder of weights. The index maps each tensor to its file."""
EXTRA_PREFIX = "released."
"""Name prefix of imported tensors that only BEiT-3's released code uses. The model has no such parameters."""

IMAGE_POSITION = "embeddings.image_position"
"""Name of the image position table. It is the only tensor whose shape depends on `image_size`."""

REPLACEABLE = ("heads.", "norm.")
"""Name prefixes of tensors that a weights file may lack: heads and the final norm."""
_METADATA_KEY = "beit3_ds"
_FORMAT_VERSION = 1


class PretrainedWeights:
    """Reads exported or imported weights from disk, one tensor at a time.

    Attributes:
        path: path of the weights, a file or a folder.
        model: configuration of the model, with the requested image size.
        step: number of optimizer steps that produced the weights; 0 if unknown.
        task: name and settings of the head's task, as from `Task.describe`. None in files of older versions, which
            contain pretraining weights.
    """

    def __init__(self, path: str | Path, *, image_size: int | None = None) -> None:
        """Opens the files, and reads the tensor names and the model's configuration.

        Args:
            path: a .safetensors file, or a folder with an index.
            image_size: new side of the input images in pixels, to which image positions are interpolated. None keeps
                the stored size.

        Raises:
            ConfigError: if the weights cannot be read, or were written by another program.
        """
        self.path = Path(path)
        self._files = _weight_files(self.path)
        self._places = self._open_files()
        headers = {(reader.metadata() or {}).get(_METADATA_KEY) for reader, _ in self._places.values()}
        if len(headers) > 1:
            raise ConfigError(f"{path}: its files belong to different exports. Export the weights again.")
        self.model, self.step, self.task = _parse_header(self.path, headers.pop())
        self._resized = image_size is not None
        if image_size is not None:
            self.model = dataclasses.replace(self.model, image_size=image_size)

    def _open_files(self) -> dict[str, tuple[Any, str]]:
        """Opens the files, and maps each tensor's current name to its file reader and its stored name."""
        readers = [_open(file) for file in self._files]
        return {name: (reader, stored) for reader in readers for name, stored in stored_names(reader.keys()).items()}

    def release_pages(self) -> None:
        """Remaps the files, so that pages read so far no longer count as memory of this process.

        If a tensor read from a file still exists, all pages read from this file still count.
        """
        self._places.clear()
        self._places = self._open_files()

    def names(self) -> list[str]:
        """Returns the names of all tensors, including those with the prefix `EXTRA_PREFIX`."""
        return list(self._places)

    def shape(self, name: str) -> torch.Size:
        """Returns the logical shape of a tensor, which is its shape without tensor parallelism."""
        return self.read(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Returns the stored dtype of a tensor."""
        return self.read(name).dtype

    def read(self, name: str, part: tuple[int, int, int, int] | None = None) -> Tensor:
        """Returns a memory-mapped tensor, or a part of it. Values are read from disk when they are used.

        Args:
            name: name of the tensor.
            part: (top, bottom, left, right) selects rows [top, bottom) and columns [left, right) of the tensor, viewed
                as a matrix (`matrix_part`). None returns the whole tensor in its logical shape.

        Raises:
            ConfigError: if the tensor does not exist.
        """
        if name not in self._places:
            raise ConfigError(f"{self.path} has no tensor '{name}'. Export or import the weights again.")
        reader, stored = self._places[name]
        tensor = reader.get_tensor(stored)
        if name == IMAGE_POSITION and self._resized:
            tensor = interpolate_positions(tensor[None], self.model.grid_size)[0]
        return tensor if part is None else matrix_part(tensor, part)


def check_task(stored: Mapping[str, Any] | None, task: str, where: str, *, needs_head: bool = False) -> None:
    """Checks that stored weights belong to the run's task or to pretraining.

    Args:
        stored: name and settings of the task that the weights belong to; None counts as pretraining.
        task: name of the run's task.
        where: name of the weights, for messages.
        needs_head: whether the weights must contain the task's head, as for an evaluation. If True, weights from
            pretraining are valid only if the run's task is pretraining.

    Raises:
        ConfigError: if the weights are not valid for the run's task; the message names the two tasks.
    """
    theirs = "pretraining" if stored is None else stored["name"]
    if theirs == task or (theirs == "pretraining" and not needs_head):
        return
    if needs_head:
        raise ConfigError(
            f"{where}: these are weights of the task {theirs}, without the head of {task}. Name weights of a run of "
            f"{task}, or use a configuration of {theirs}."
        )
    raise ConfigError(
        f"{where}: these are weights of the task {theirs}, but the task of this run is {task}. Name weights of {task} "
        f"or of pretraining, or write these without their head: `beit3 export WEIGHTS OUT.safetensors --no-heads`."
    )


def weights_metadata(model: ModelConfig, step: int, task: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Returns the safetensors metadata for each file of exported weights.

    Args:
        model: configuration of the model.
        step: number of optimizer steps that produced the weights.
        task: name and settings of the head's task; None if unknown.
    """
    header: dict[str, Any] = {"format_version": _FORMAT_VERSION, "model": dataclasses.asdict(model), "step": step}
    if task is not None:
        header["task"] = dict(task)
    return {_METADATA_KEY: json.dumps(header)}


def parse_task(value: Any) -> dict[str, Any] | None:
    """Checks and returns the task in a file's header, or returns None if the header has no task.

    Args:
        value: JSON value of the header's task; None if the header has no task.

    Raises:
        TypeError: if the value is neither None nor a JSON object with a name.
    """
    if value is not None and not (isinstance(value, dict) and isinstance(value.get("name"), str)):
        raise TypeError(f"the task {str(value)[:80]!r} has no name")
    return value


def is_pretrained_file(file: Path) -> bool:
    """Returns whether a file has the header of exported weights."""
    try:
        return _METADATA_KEY in check_safetensors(file).metadata
    except (OSError, ValueError):
        return False


def matrix_part(tensor: Tensor, part: tuple[int, int, int, int]) -> Tensor:
    """Views a tensor as a matrix, and returns rows [top, bottom) and columns [left, right) without copying.

    The first dimension becomes the rows, and all other dimensions together become the columns. A vector has one column.

    Args:
        tensor: a contiguous tensor.
        part: (top, bottom, left, right).
    """
    top, bottom, left, right = part
    return tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1)[top:bottom, left:right]


def check_tensors(where: str, found: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> list[str]:
    """Checks the tensors of a weights file against the parameters of a model. Ignores heads that the model lacks.

    Args:
        where: name of the file, for messages.
        found: shape of each tensor in the file, by name.
        wanted: shape of each parameter of the model, by name.

    Returns:
        Names of the head and final-norm parameters that the file lacks. Some fine-tuned releases lack these parameters.

    Raises:
        ConfigError: if the file lacks a parameter outside the head and the final norm, if a tensor is unknown, or if a
            shape differs.
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
        if shape != wanted.get(name, shape) and name.startswith("heads."):
            raise ConfigError(
                f"{where}: {name} has the shape {tuple(shape)}, but the head of this run needs {tuple(wanted[name])}. "
                f"Give the run the answers or classes of these weights, or write them without their head: `beit3 "
                f"export {where} OUT.safetensors --no-heads`."
            )
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
        if (path / "checkpoints").is_dir():
            raise ConfigError(f"{path} is the folder of a training run. Use `beit3 export {path} OUT.safetensors`.")
        raise ConfigError(
            f"the folder {path} holds no weights: neither {INDEX_NAME} nor checkpoints. Name what `beit3 export`, "
            "`beit3 import` or a training run wrote."
        )
    try:
        content = check_object(parse_untrusted_json(read_regular(path / INDEX_NAME, MAX_JSON_BYTES)))
        names = {check_text(name) for name in check_object(content["weight_map"]).values()}
        if outside := next((name for name in names if name in ("", ".", "..") or "/" in name or "\0" in name), None):
            raise ValueError(f"it names the file {outside[:80]!r} outside its folder")
        return [path / name for name in sorted(names)]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path / INDEX_NAME} cannot be read ({error!r}). Export the weights again.") from error


def _open(file: Path) -> Any:
    try:
        check_safetensors(file)
        return safe_open(file, "pt")
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"{file} is not a readable safetensors file ({error}). Name a file that `beit3 export` or `beit3 import` "
            f"wrote; released .pth files go through `beit3 import` first."
        ) from error


def _parse_header(path: Path, text: str | None) -> tuple[ModelConfig, int, dict[str, Any] | None]:
    if text is None:
        raise ConfigError(
            f"{path} holds tensors, but no configuration of this project's: another program wrote it. Convert released "
            f"weights with `beit3 import {path} OUT.safetensors`."
        )
    try:
        header = check_object(parse_untrusted_json(text))
        version, model, step = header["format_version"], header["model"], check_count(header["step"])
        task = parse_task(header.get("task"))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: its header cannot be read ({error!r}). Export the weights again.") from error
    if version != _FORMAT_VERSION:
        raise ConfigError(f"{path}: format version {version}, but this program reads {_FORMAT_VERSION}. Update it.")
    return load_section(ModelConfig, model, f"{path}: model"), step, task


def _examples(names: Iterable[str]) -> str:
    shown = ", ".join(list(names)[:3])
    return f" ({shown})" if shown else ""
