"""Reads tensors from the files of other projects without running code in these files."""

import argparse
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from beit3_ds.config import ConfigError
from beit3_ds.regular_file import open_regular
from beit3_ds.safetensors_header import check_safetensors

_MAX_PICKLE_BYTES = 1 << 23  # names, shapes and options; for a thousand tensors they take 200 kB


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a .safetensors or PyTorch file without running code in the file.

    Tensors are memory-mapped, so a large file need not fit in memory. Only PyTorch files from before version 1.6 are
    read whole.

    Args:
        path: a .safetensors file, or a PyTorch file with a dict of tensors at the top level or under "state_dict" or
            "model".

    Raises:
        ConfigError: if the file cannot be read, contains objects other than plain data, or contains no dict of tensors.
    """
    return read_tensors_with_note(path, None)[0]


def read_tensors_with_note(path: str | Path, note_key: str | None) -> tuple[dict[str, Tensor], str | None]:
    """Reads the tensors of a file, like `read_tensors`, and one text stored with them.

    Args:
        path: a file, as for `read_tensors`.
        note_key: key of the text, in the metadata of a .safetensors file or at the top level of a PyTorch file. None
            reads no text.

    Returns:
        The tensors by name, and the text, or None if there is none.

    Raises:
        ConfigError: if the file cannot be read, contains objects other than plain data, or contains no dict of tensors.
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
        metadata = check_safetensors(path).metadata  # check first: the library would block on a pipe
        return load_file(path), metadata.get(note_key) if note_key else None
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read as a file of tensors: {error}") from error


def _load_torch(path: Path) -> object:
    try:
        os.close(open_regular(path))
        _check_archive(path)
    except Exception as error:  # zipfile raises nearly anything on damaged bytes
        raise ConfigError(f"{path} cannot be read as a file of tensors: {error}") from error
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


def _check_archive(path: Path) -> None:
    """Rejects a PyTorch file with compressed members, or with a pickle of more than `_MAX_PICKLE_BYTES` bytes."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise ValueError(f"{member.filename[:80]!r} in it is compressed, which torch does not write")
            if member.filename.endswith("data.pkl") and member.file_size > _MAX_PICKLE_BYTES:
                raise ValueError(f"its description has {member.file_size} bytes, more than {_MAX_PICKLE_BYTES}")


def _unsafe_names(path: Path) -> str:
    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or "none by name"
    except Exception:  # as above; the message works without the names
        return "none that could be listed"
