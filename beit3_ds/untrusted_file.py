"""Reads files of tensors from other projects without running any code in them."""

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from beit3_ds.config import ConfigError


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a .safetensors file or a torch file, without running any code in the file.

    Using a tensor reads its pages from disk, so that a large file need not fit in memory. Only torch's format before
    version 1.6 is read whole.

    Args:
        path: a .safetensors file, or a torch file that holds tensors by name at its top or under "state_dict" or
            "model".

    Raises:
        ConfigError: if the file cannot be read, holds objects that are not plain data, or holds no tensors by name.
    """
    return read_tensors_with_note(path, None)[0]


def read_tensors_with_note(path: str | Path, note_key: str | None) -> tuple[dict[str, Tensor], str | None]:
    """Reads tensors as `read_tensors` does, and a text that the file stores with them.

    Args:
        path: the file, as for `read_tensors`.
        note_key: key of the text, in the metadata of a .safetensors file or at the top of a torch file.

    Returns:
        The tensors, and the text or None if there is none.

    Raises:
        ConfigError: as `read_tensors` does.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state, note = _load_safetensors(path, note_key)
    else:
        state = _load_torch(path)
        note = state.get(note_key) if isinstance(state, Mapping) and note_key else None
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"{path} holds no tensors by name. Save the network's state_dict().")
    return {str(name): value for name, value in state.items()}, note if isinstance(note, str) else None


def _load_safetensors(path: Path, note_key: str | None) -> tuple[object, str | None]:
    try:
        with safe_open(path, "pt") as file:
            note = (file.metadata() or {}).get(note_key) if note_key else None
        return load_file(path), note
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read as a file of tensors: {error}") from error


def _load_torch(path: Path) -> object:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain data; training scripts save their options
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path} cannot be read as a file of tensors: it is damaged, or holds Python objects that could run code "
            f"({_unsafe_names(path)}), which are never loaded. Have its author save the network's state_dict() alone."
        ) from error
    except Exception as error:  # torch's reader raises nearly anything on damaged bytes, AssertionError included
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(f"{path} cannot be read as a file of tensors: {reason}") from error


def _unsafe_names(path: Path) -> str:
    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or "none by name"
    except Exception:  # as above; the message works without the names
        return "none that could be listed"
