"""What `beit3 inspect` says of weights on disk."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from beit3_ds.checkpoint.export import format_bytes
from beit3_ds.checkpoint.released import ReleasedFile
from beit3_ds.checkpoint.source import TensorSource, open_source
from beit3_ds.model.pretrained import EXTRA_PREFIX

_EXPERT = re.compile(r"_(vision_language|vision|language)$")


def describe_weights(path: Path, *, every_tensor: bool = False) -> str:
    """Describes exported weights or a released file: configuration, parameters of each part, types and size.

    Args:
        path: what `open_source` opens.
        every_tensor: whether to list every tensor too.

    Raises:
        ConfigError: if there is nothing to open.
    """
    source = open_source(path)
    kind = "released weights (unilm's layout)" if isinstance(source, ReleasedFile) else "exported weights"
    step = f", after {source.step} updates" if source.step else ""
    lines = [f"{path}: {kind}{step}", *_describe_model(source), "", *_part_table(source)]
    if every_tensor:
        rows = [(name, _dtype(source.dtype(name)), str(list(source.shape(name)))) for name in source.names()]
        lines += ["", *_table(("tensor", "type", "shape"), rows)]
    return "\n".join(lines)


def part_of(name: str) -> str:
    """The part of the model that a logical tensor belongs to, as a reader would call it."""
    if name.startswith(EXTRA_PREFIX):
        return "kept for unilm's layout"
    expert = _EXPERT.search(name)
    whose = f", {expert[1].replace('_', '-')}" if expert else ""
    if ".attention." in name:
        return f"attention{whose}"
    if ".ffn." in name:
        return f"experts{whose}"
    if name.startswith("heads.norm."):
        return f"final norm{whose}"
    return {"heads.mim": "MIM head", "heads.mlm": "MLM head"}.get(name.rsplit(".", 1)[0], "embeddings")


def _describe_model(source: TensorSource) -> list[str]:
    return [f"  {name}: {value}" for name, value in dataclasses.asdict(source.model).items()]


def _part_table(source: TensorSource) -> list[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in source.names():
        groups[part_of(name)].append(name)
    rows = [_part_row(source, part, names) for part, names in groups.items()]
    own = [name for name in source.names() if not name.startswith(EXTRA_PREFIX)]
    rows.append(_part_row(source, "the model", own))
    return _table(("part", "tensors", "parameters", "size", "type"), rows)


def _part_row(source: TensorSource, part: str, names: list[str]) -> tuple[str, ...]:
    sizes = [(source.shape(name).numel(), source.dtype(name)) for name in names]
    num_bytes = sum(count * dtype.itemsize for count, dtype in sizes)
    types = ", ".join(sorted({_dtype(dtype) for _, dtype in sizes}))
    return part, f"{len(names)}", f"{sum(count for count, _ in sizes):,}", format_bytes(num_bytes), types


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their longest cell; numbers to the right."""
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
