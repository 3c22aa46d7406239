"""Describes weights on disk as text, for `beit3 inspect`."""

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from beit3_ds.checkpoint.folder import CheckpointFolder, is_checkpoint, open_checkpoint
from beit3_ds.checkpoint.run_description import flatten
from beit3_ds.model.pretrained import EXTRA_PREFIX
from beit3_ds.printing import printable
from beit3_ds.weights.export import format_bytes
from beit3_ds.weights.reader import WeightReader, open_weights
from beit3_ds.weights.released import ReleasedFile
from beit3_ds.weights.timm_file import TimmFile

_EXPERT = re.compile(r"_(vision_language|vision|language)$")


_TOKENIZER_PARTS = ("encoder.", "decoder.", "encode_task_layer.", "decode_task_layer.")
"""Name prefixes of a visual tokenizer's tensors."""


def describe_weights(path: Path, *, every_tensor: bool = False) -> str:
    """Describes a checkpoint or a weights file as text: configuration, parameters per part, and sizes.

    For a checkpoint, the files are verified with their digests, and the text includes the run's settings.

    Args:
        path: a path that `open_weights` accepts.
        every_tensor: whether to list every tensor too.

    Raises:
        ConfigError: if the path contains no weights, or the checkpoint is incomplete or damaged.
    """
    reader: WeightReader = open_checkpoint(path, kind=None) if is_checkpoint(path) else open_weights(path)
    step = f", after {reader.step} updates" if reader.step else ""
    where = reader.path if isinstance(reader, CheckpointFolder) else path
    lines = [f"{where}: {_kind(reader)}{step}"]
    if isinstance(reader, CheckpointFolder):
        lines += [*_describe_run(reader), "model:"]
    elif reader.task is not None:
        lines.append(f"  task: {describe_task(reader.task)}")
    lines += [*_describe_model(reader), "", *_part_table(reader)]
    if every_tensor:
        rows = [(name, _dtype(reader.dtype(name)), str(list(reader.shape(name)))) for name in _held(reader)]
        lines += ["", *_table(("tensor", "type", "shape"), rows)]
    return "\n".join(map(printable, lines))


def describe_task(task: Mapping[str, Any]) -> str:
    """Describes a task's name and settings, such as "vqa (num_answers 3129)".

    A list or a dict is replaced by its length.
    """
    settings = [
        f"{key} {f'of {len(value)}' if isinstance(value, list | dict) else value}"
        for key, value in task.items()
        if key != "name"
    ]
    return f"{task['name']} ({', '.join(settings)})" if settings else str(task["name"])


def part_of(name: str) -> str:
    """Returns the name of the model part that contains a tensor, such as "attention, vision".

    Args:
        name: name of the tensor in this project.
    """
    if name.startswith(EXTRA_PREFIX):
        return "kept for unilm's format"
    expert = _EXPERT.search(name)
    whose = f", {expert[1].replace('_', '-')}" if expert else ""
    if name.startswith(_TOKENIZER_PARTS):
        return f"visual tokenizer, {name.partition('.')[0]}"
    if ".attention." in name:
        return f"attention{whose}"
    if ".ffn." in name:
        return f"experts{whose}"
    if name.startswith("norm."):
        return f"final norm{whose}"
    if name.startswith("heads."):
        return {"heads.mim": "MIM head", "heads.mlm": "MLM head"}.get(name.rsplit(".", 1)[0], "head of the task")
    return "embeddings"


def _kind(reader: WeightReader) -> str:
    if isinstance(reader, CheckpointFolder):
        return "checkpoint"
    return reader.description if isinstance(reader, ReleasedFile | TimmFile) else "exported weights"


def _held(reader: WeightReader) -> list[str]:
    """Returns the names of the tensors that are in the file. Leaves out tensors that the reader fills with initial
    values.
    """
    return reader.held if isinstance(reader, TimmFile) else reader.names()


def _describe_run(folder: CheckpointFolder) -> list[str]:
    """Describes a checkpoint's files, tensors, layout, library versions, tokenizers and run settings, one line each."""
    run, files = folder.index.run, folder.index.files
    num_pieces = sum(folder.index.num_pieces.values())
    num_bytes = sum(file.num_bytes for file in files.values())
    return [
        f"  {len(files)} files of {format_bytes(num_bytes)} are as their digests say: {num_pieces} pieces of "
        f"{len(folder.index.shapes)} tensors, float32 weights and both moments of AdamW",
        f"  {len(folder.index.buffers)} buffers in their own types",
        f"  AdamW has counted {folder.index.optimizer_step} updates",
        f"  written by {run.layout}",
        f"  with {', '.join(f'{name} {number}' for name, number in run.versions.items())}",
        *(f"  {kind} tokenizer: SHA-256 {digest}" for kind, digest in run.tokenizers.items()),
        "settings:",
        *(f"  {key}: {json.dumps(value)}" for key, value in flatten(run.config)),
    ]


def _describe_model(reader: WeightReader) -> list[str]:
    if isinstance(reader, CheckpointFolder):  # a checkpoint of any task
        return [f"  {name}: {value}" for name, value in reader.index.run.model.items()]
    fields = dataclasses.asdict(reader.model)
    return [f"  {name}: {value}" for name, value in fields.items()]


def _part_table(reader: WeightReader) -> list[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in _held(reader):
        groups[part_of(name)].append(name)
    rows = [_part_row(reader, part, names) for part, names in groups.items()]
    own = [name for name in _held(reader) if not name.startswith(EXTRA_PREFIX)]
    rows.append(_part_row(reader, "the vision tower" if isinstance(reader, TimmFile) else "the model", own))
    return _table(("part", "tensors", "parameters", "size", "type"), rows)


def _part_row(reader: WeightReader, part: str, names: list[str]) -> tuple[str, ...]:
    sizes = [(reader.shape(name).numel(), reader.dtype(name)) for name in names]
    num_bytes = sum(count * dtype.itemsize for count, dtype in sizes)
    types = ", ".join(sorted({_dtype(dtype) for _, dtype in sizes}))
    return part, f"{len(names)}", f"{sum(count for count, _ in sizes):,}", format_bytes(num_bytes), types


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Formats rows as a text table; columns of numbers are right-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    numeric = [all(line[column][:1].isdigit() for line in lines[1:]) for column in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    ]
