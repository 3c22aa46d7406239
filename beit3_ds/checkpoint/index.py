"""Reads and writes the index of a checkpoint: its tensors, the file of every piece, and the digests of the files.

    step-00001000/
      index.json                     this file
      weights-00000.safetensors      float32 weights of the pieces that rank 0 wrote
      moments-00000.safetensors      AdamW's moments of the same pieces
      averages-00000.safetensors     moving averages of the same weights, in a run with `training.ema_decay`
      buffers-00000.safetensors      persistent buffers of the stage that rank 0 belongs to, if it has any
      weights-00001.safetensors      ...

A logical tensor is a whole tensor of the model, without any parallelism; a piece is a slice of it. The pieces of a
tensor cover each of its elements once. Names and shapes describe the whole model, so only the cuts between pieces
depend on the layout that wrote a checkpoint. A buffer is equal on all ranks that have it; one of them writes all of it,
in its own dtype.
"""

import hashlib
import itertools
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
from beit3_ds.checkpoint.slices import TensorSlice, whole_slice
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
VERSION = 1
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
"""Values saved per element in every run: the float32 weight and AdamW's two moments."""
AVERAGE = "average"
"""Moving average of the weight, saved only in a run with `training.ema_decay`."""
FILE_KINDS = {"weights": (WEIGHT,), "moments": MOMENTS, "averages": (AVERAGE,)}
"""For each kind of file that a rank writes, the first part of its name and the values that it holds."""
BEST = "best"
"""Key in `Index.data` under which the best evaluation is stored; the checkpoint of its `step` is never deleted."""
BUFFERS = "buffers"
"""First part of the name of a file with persistent buffers, and key of the buffers in the index."""

_FILE_NAME = re.compile(rf"({'|'.join((*FILE_KINDS, BUFFERS))})-[0-9]{{5,9}}\.safetensors")
_BYTES_PER_FILE = 1 << 16  # by which each file in the folder raises the limit of the index's size
_SHOWN = 80  # most characters of a name in a message


class Piece(NamedTuple):
    """Describes a piece of a tensor: its slice, and the rank that wrote it."""

    rank: int
    part: TensorSlice


class StoredBuffer(NamedTuple):
    """Describes a persistent buffer of the model, and names the rank whose file holds it."""

    rank: int
    """Rank that wrote the buffer."""
    dtype: str
    """Name of the buffer's dtype in torch, such as "float32"."""
    shape: tuple[int, ...]
    """Shape of the buffer."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """Holds the content of a checkpoint's index file."""

    step: int
    """Number of updates done before the checkpoint was saved."""
    optimizer_step: int
    """Number of updates that AdamW has counted; skipped updates are not counted."""
    run: RunDescription
    shapes: Mapping[str, torch.Size]
    """Shape of every whole tensor, by the tensor's name."""
    pieces: Mapping[str, Sequence[Piece]]
    """Pieces of every tensor, by the tensor's name; together they cover each of its elements once."""
    files: Mapping[str, WrittenFile]
    """Size and digest of every file except the index."""
    buffers: Mapping[str, StoredBuffer] = field(default_factory=dict)
    """Persistent buffers by name, such as the codebook of a visual tokenizer; empty for a model without any."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Position in the data, broken records, best evaluation and similar state as plain JSON, which does not depend on
    the layout. Empty in a checkpoint of an older version."""
    old_names: Mapping[str, str] = field(default_factory=dict)
    """Maps the current name of each renamed tensor to its old name in the checkpoint's files."""

    @property
    def best_step(self) -> int | None:
        """Returns the step of the best evaluation before this checkpoint was saved; None if none was recorded."""
        step = self.data.get(BEST, {}).get("step")
        return step if isinstance(step, int) else None

    def stored_name(self, name: str) -> str:
        """Returns the name of a tensor in the checkpoint's files: the old name if the tensor was renamed since."""
        return self.old_names.get(name, name)

    def to_json(self) -> bytes:
        """Returns the bytes of the index file: JSON with a digest of all its other entries."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "optimizer_step": self.optimizer_step,
            **{name: getattr(self.run, name) for name in RunDescription.__dataclass_fields__},
            "data": self.data,
            "files": {name: list(file) for name, file in sorted(self.files.items())},
            "tensors": {
                self.stored_name(name): {
                    "shape": list(self.shapes[name]),
                    "pieces": [[rank, *part] for rank, part in self.pieces[name]],
                }
                for name in sorted(self.shapes, key=self.stored_name)
            },
            BUFFERS: {name: list(buffer) for name, buffer in sorted(self.buffers.items())},
        }
        return _serialize({**content, "sha256": hashlib.sha256(_serialize(content)).hexdigest()})


class BrokenIndexError(ValueError):
    """Reports an index that is truncated, was changed, belongs to another program, or has gaps in its tensors."""


def read_index(folder: Path) -> Index:
    """Reads and checks the index of a checkpoint's folder without opening the other files.

    Raises:
        BrokenIndexError: if the index is missing, unreadable or invalid; the message describes the fault briefly.
    """
    try:
        limit = MAX_JSON_BYTES + _BYTES_PER_FILE * len(os.listdir(folder))
        content = parse_untrusted_json(
            read_regular(folder / INDEX_NAME, limit, follow_links=False), limit, has_constants=True
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
    if (content["format"], content["version"]) != (FORMAT, VERSION):
        shown = str(content["format"])[:_SHOWN], str(content["version"])[:_SHOWN]
        raise BrokenIndexError(f"{INDEX_NAME} is of format {shown[0]!r}, version {shown[1]}")
    if hashlib.sha256(_serialize(content)).hexdigest() != digest:
        raise BrokenIndexError(f"{INDEX_NAME} was changed: its digest is another")
    content["config"] = with_new_keys(check_object(content["config"]))
    names = stored_names(check_object(content["tensors"]))
    tensors = {name: check_object(content["tensors"][stored]) for name, stored in names.items()}
    index = Index(
        step=check_count(content["step"]),
        optimizer_step=check_count(content["optimizer_step"]),
        run=_parse_run(content),
        shapes={name: _parse_shape(tensor["shape"]) for name, tensor in tensors.items()},
        pieces={
            name: [_parse_piece(piece) for piece in check_list(tensor["pieces"])] for name, tensor in tensors.items()
        },
        files={_parse_file_name(name): _parse_file(file) for name, file in check_object(content["files"]).items()},
        buffers={name: _parse_buffer(buffer) for name, buffer in check_object(content.get(BUFFERS, {})).items()},
        data=_parse_data(content.get("data", {})),
        old_names={name: stored for name, stored in names.items() if name != stored},
    )
    check_cover(index.shapes, index.pieces)
    return index


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
    """Checks the best evaluation in `data` and returns `data`; the code that reads another key checks that key."""
    data = check_object(data)
    if BEST in data:
        best = check_object(data[BEST])
        check_count(best["step"]), check_count(best["evaluations_since"]), check_text(best["metric"])
        if type(best["value"]) not in (int, float):
            raise ValueError(f"the best value is {str(best['value'])[:_SHOWN]!r}")
    return data


def _parse_shape(shape: Any) -> torch.Size:
    return torch.Size(check_count(value) for value in check_list(shape))


def _parse_piece(piece: Any) -> Piece:
    rank, *part = check_list(piece, 5)
    check_count(rank)
    top, bottom, left, right = map(check_count, part)
    return Piece(rank, TensorSlice(top, bottom, left, right))


def _parse_file_name(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"it names {name[:_SHOWN]!r}, which is no file of a checkpoint")
    return name


def _parse_file(file: Any) -> WrittenFile:
    num_bytes, digest = check_list(file, 2)
    return WrittenFile(check_count(num_bytes), check_text(digest))


def _parse_buffer(buffer: Any) -> StoredBuffer:
    rank, dtype, shape = check_list(buffer, 3)
    return StoredBuffer(check_count(rank), check_text(dtype), tuple(_parse_shape(shape)))


def _describe_newer(content: dict[str, Any]) -> str:
    """Returns an error message for an index of a newer format; it names the version of this program that reads it."""
    versions = content.get("versions")
    writer = versions.get("beit3_ds") if isinstance(versions, dict) else None
    needed = f"beit3_ds {writer[:_SHOWN]!a}" if isinstance(writer, str) else "a newer beit3_ds"
    return (
        f"{INDEX_NAME} has format version {str(content['version'])[:_SHOWN]}, which needs {needed}; this is beit3_ds "
        f"{version('beit3_ds')}, which reads up to version {VERSION}"
    )


def check_cover(shapes: Mapping[str, torch.Size], pieces: Mapping[str, Sequence[Piece]]) -> None:
    """Checks that the pieces of each tensor cover each of its elements exactly once and nothing else.

    Raises:
        BrokenIndexError: if the pieces overlap, leave gaps or exceed the tensor; the message names the tensor.
    """
    for name, shape in shapes.items():
        bounds, parts = whole_slice(shape), [piece.part for piece in pieces[name]]
        num_elements = sum(part.num_elements for part in parts)
        inside = all(part.intersection(bounds) == part for part in parts)
        if not inside or num_elements != bounds.num_elements or not _cover_oddly(bounds, parts):
            raise BrokenIndexError(f"the pieces of {name[:_SHOWN]} do not cover it once")


def _cover_oddly(bounds: TensorSlice, parts: Sequence[TensorSlice]) -> bool:
    """Returns whether slices cover each element of `bounds` an odd number of times, and no other element.

    This holds if every point is a corner of an even number of rectangles, where `bounds` counts as a rectangle too. If
    the slices also have as many elements in total as `bounds`, they cover each element exactly once. The time is linear
    in the number of slices.
    """
    odd: set[tuple[int, int]] = set()
    for part in (bounds, *parts):
        for corner in itertools.product((part.top, part.bottom), (part.left, part.right)):
            odd ^= {corner}
    return not odd


def file_name(kind: str, rank: int) -> str:
    """Returns the name of a rank's file of one kind: a key of `FILE_KINDS`, or `BUFFERS`."""
    return f"{kind}-{rank:05d}.safetensors"


def tensor_key(kind: str, name: str, part: TensorSlice) -> str:
    """Returns the name of a piece in a safetensors file, such as "head.weight exp_avg [0:64, 0:768]"."""
    return f"{name} {kind} [{part.top}:{part.bottom}, {part.left}:{part.right}]"


def _serialize(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
