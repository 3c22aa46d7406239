"""Reads and writes a checkpoint's index, which lists the tensors' shapes and the files' sizes and digests.

    step-00001000/
      index.json                     the index
      pieces-00000.safetensors       table of the pieces of all tensors, with the rank that wrote each piece
      weights-00000.safetensors      float32 weights in the pieces that rank 0 wrote
      moments-00000.safetensors      AdamW's moments of these weights
      averages-00000.safetensors     moving averages of these weights, in a run with `training.ema_decay`
      buffers-00000.safetensors      persistent buffers of rank 0's pipeline stage, if there are any
      weights-00001.safetensors      ...

A logical tensor is a whole tensor of the model, without any parallelism. A piece is a slice of a logical tensor. The
layout of the ranks determines only where pieces start and end.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from beit3_ds.checkpoint.run_description import RunDescription
from beit3_ds.checkpoint.slices import TensorSlice
from beit3_ds.checkpoint.tensor_file import WrittenFile
from beit3_ds.config.renamed_keys import with_new_keys
from beit3_ds.model.renamed_tensors import stored_names
from beit3_ds.regular_file import read_regular
from beit3_ds.untrusted_json import (
    MAX_JSON_BYTES,
    check_count,
    check_list,
    check_object,
    check_text,
    parse_untrusted_json,
)

INDEX_NAME = "index.json"
FORMAT = "beit3_ds checkpoint"
VERSION = 2
_OLD_VERSION = 1
"""Index format of program version 0.1. Such an index also lists the pieces of each tensor."""
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
"""Names of the values that every run saves per element: the float32 weight and AdamW's two moments."""
AVERAGE = "average"
"""Name of the values that only a run with `training.ema_decay` saves: the moving averages of the weights."""
FILE_KINDS = {"weights": (WEIGHT,), "moments": MOMENTS, "averages": (AVERAGE,)}
"""Maps each kind of file to the kinds of values in the file. The name of a file starts with its kind."""
BEST = "best"
"""Key under which `Index.data` stores the best evaluation so far. A save does not delete the best evaluation's
checkpoint."""
BUFFERS = "buffers"
"""First part of the names of buffer files, and key of the buffers in the index."""

PIECES = "pieces"
"""First part of the name of the file that lists the pieces of tensors. Also the name of the tensor in that file."""
PIECES_FILE = "pieces-00000.safetensors"
"""Name of the file with the table of all pieces. The main rank writes this file."""

_FILE_NAME = re.compile(rf"({'|'.join((*FILE_KINDS, BUFFERS, PIECES))})-[0-9]{{5,9}}\.safetensors")
_BYTES_PER_FILE = 1 << 16  # each file in the folder raises the size limit of the index by this much
_SHOWN = 80  # maximum characters of a name in a message


class StoredBuffer(NamedTuple):
    """Describes a persistent buffer of the model, and the file that contains it."""

    rank: int
    """Rank that wrote the buffer to its file."""
    dtype: str
    """Dtype of the buffer without "torch.", such as "float32"."""
    shape: tuple[int, ...]
    """Shape of the buffer."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """Content of a checkpoint's index file."""

    step: int
    """Number of training steps before the checkpoint was saved, including skipped steps."""
    optimizer_step: int
    """AdamW's count of updates; does not include skipped updates."""
    run: RunDescription
    shapes: Mapping[str, torch.Size]
    """Shape of every whole tensor, by name."""
    num_pieces: Mapping[str, int]
    """Number of pieces of every tensor, by name, in the order of the tensors in the pieces file (`PieceTable`)."""
    files: Mapping[str, WrittenFile]
    """Size and digest of every file except the index, by name."""
    buffers: Mapping[str, StoredBuffer] = field(default_factory=dict)
    """Persistent buffers by name, such as the codebook of a visual tokenizer; empty if the model has none."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Position in the data, broken records, best evaluation and more, as plain JSON; empty in old checkpoints."""
    old_names: Mapping[str, str] = field(default_factory=dict)
    """Maps the current name of each renamed tensor to the old name in the checkpoint's files."""
    old_pieces: Mapping[str, Sequence[Any]] | None = None
    """Unchecked pieces of every tensor from an index of format 1, which has no pieces file; None for later formats."""

    @property
    def best_step(self) -> int | None:
        """Returns the step of the best evaluation before this checkpoint was saved; None if none was recorded."""
        step = self.data.get(BEST, {}).get("step")
        return step if isinstance(step, int) else None

    def stored_name(self, name: str) -> str:
        """Returns the name of a tensor in the checkpoint's files: the old name if the tensor was renamed."""
        return self.old_names.get(name, name)

    def to_json(self) -> bytes:
        """Returns the content of the index file: JSON, including a digest of all other entries."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "optimizer_step": self.optimizer_step,
            **{name: getattr(self.run, name) for name in RunDescription.__dataclass_fields__},
            "data": self.data,
            "files": {name: list(file) for name, file in sorted(self.files.items())},
            "tensors": {
                self.stored_name(name): {"shape": list(self.shapes[name]), "pieces": count}
                for name, count in self.num_pieces.items()
            },
            BUFFERS: {name: list(buffer) for name, buffer in sorted(self.buffers.items())},
        }
        return _serialize({**content, "sha256": hashlib.sha256(_serialize(content)).hexdigest()})


class BrokenIndexError(ValueError):
    """Reports an index that is missing or invalid, or that does not fit the checkpoint's files and tensors."""


def index_limit(folder: Path) -> int:
    """Returns the maximum allowed size in bytes of a folder's index; the limit grows with the number of files."""
    return MAX_JSON_BYTES + _BYTES_PER_FILE * len(os.listdir(folder))


def read_index(folder: Path) -> Index:
    """Reads and checks the index in a checkpoint's folder; does not open other files.

    Raises:
        BrokenIndexError: if the index is missing, unreadable or invalid; the message describes the fault briefly.
    """
    try:
        limit = index_limit(folder)
        content = parse_untrusted_json(
            read_regular(folder / INDEX_NAME, limit, follow_links=False), limit, accepts_constants=True
        )
        return _parse(check_object(content))
    except BrokenIndexError:
        raise
    except FileNotFoundError:
        raise BrokenIndexError(f"{INDEX_NAME} is missing") from None
    except OSError as error:
        raise BrokenIndexError(f"{INDEX_NAME} cannot be read: {error.strerror or error}") from None
    except KeyError as error:
        raise BrokenIndexError(f"no readable {INDEX_NAME}: it has no {error}") from None
    except (ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise BrokenIndexError(f"no readable {INDEX_NAME}: {error}") from None


def _parse(content: dict[str, Any]) -> Index:
    digest = content.pop("sha256")
    if content["format"] == FORMAT and isinstance(content["version"], int) and content["version"] > VERSION:
        raise BrokenIndexError(_describe_newer(content))
    if content["format"] != FORMAT or content["version"] not in (_OLD_VERSION, VERSION):
        shown = str(content["format"])[:_SHOWN], str(content["version"])[:_SHOWN]
        raise BrokenIndexError(f"{INDEX_NAME} is of format {shown[0]!r}, version {shown[1]}")
    if hashlib.sha256(_serialize(content)).hexdigest() != digest:
        raise BrokenIndexError(f"{INDEX_NAME} was changed: its digest is another")
    content["config"] = with_new_keys(check_object(content["config"]))
    names = stored_names(check_object(content["tensors"]))
    tensors = {name: check_object(content["tensors"][stored]) for name, stored in names.items()}
    pieces = {name: tensor["pieces"] for name, tensor in tensors.items()}
    is_old = content["version"] == _OLD_VERSION
    return Index(
        step=check_count(content["step"]),
        optimizer_step=check_count(content["optimizer_step"]),
        run=_parse_run(content),
        shapes={name: _parse_shape(tensor["shape"]) for name, tensor in tensors.items()},
        num_pieces={name: len(check_list(value)) if is_old else check_count(value) for name, value in pieces.items()},
        files={_parse_file_name(name): _parse_file(file) for name, file in check_object(content["files"]).items()},
        buffers={name: _parse_buffer(buffer) for name, buffer in check_object(content.get(BUFFERS, {})).items()},
        data=_parse_data(content.get("data", {})),
        old_names={name: stored for name, stored in names.items() if name != stored},
        old_pieces=pieces if is_old else None,
    )


def _parse_run(content: Mapping[str, Any]) -> RunDescription:
    for key in ("tokenizers", "versions"):
        for value in check_object(content[key]).values():
            check_text(value)
    check_object(content["model"])
    check_text(content["layout"])
    for section in ("task", "training", "data", "parallel", "tokenizers"):
        check_object(content["config"].get(section, {}))
    return RunDescription(**{name: content[name] for name in RunDescription.__dataclass_fields__})


def _parse_data(data: Any) -> dict[str, Any]:
    """Returns `data` after checking the value of the key for the best evaluation. Code that reads another key must
    check its value.
    """
    data = check_object(data)
    if BEST in data:
        best = check_object(data[BEST])
        check_count(best["step"]), check_count(best["evaluations_since"]), check_text(best["metric"])
        if type(best["value"]) not in (int, float):
            raise ValueError(f"the best value is {str(best['value'])[:_SHOWN]!r}")
    return data


def _parse_shape(shape: Any) -> torch.Size:
    return torch.Size(check_count(value) for value in check_list(shape))


def _parse_file_name(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"it names {name[:_SHOWN]!r}, which is not a file of a checkpoint")
    return name


def _parse_file(file: Any) -> WrittenFile:
    num_bytes, digest = check_list(file, 2)
    return WrittenFile(check_count(num_bytes), check_text(digest))


def _parse_buffer(buffer: Any) -> StoredBuffer:
    rank, dtype, shape = check_list(buffer, 3)
    return StoredBuffer(check_count(rank), check_text(dtype), tuple(_parse_shape(shape)))


def _describe_newer(content: dict[str, Any]) -> str:
    """Returns an error message for an index of a newer format. It tells which version wrote the index."""
    versions = content.get("versions")
    writer = versions.get("beit3_ds") if isinstance(versions, dict) else None
    needed = f"beit3_ds {writer[:_SHOWN]!a}" if isinstance(writer, str) else "a newer beit3_ds"
    return (
        f"{INDEX_NAME} has format version {str(content['version'])[:_SHOWN]}, which needs {needed}; this is beit3_ds "
        f"{version('beit3_ds')}, which reads up to version {VERSION}"
    )


def file_name(kind: str, rank: int) -> str:
    """Returns the name of a rank's file, such as `weights-00003.safetensors`.

    Args:
        kind: kind of file, either `BUFFERS` or a key of `FILE_KINDS`.
        rank: the rank that writes the file.
    """
    return f"{kind}-{rank:05d}.safetensors"


def tensor_key(kind: str, name: str, part: TensorSlice) -> str:
    """Returns the name of a slice in a safetensors file, such as "head.weight exp_avg [0:64, 0:768]"."""
    return f"{name} {kind} [{part.top}:{part.bottom}, {part.left}:{part.right}]"


def _serialize(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
