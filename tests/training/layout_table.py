"""Prints the tables of docs/tested_layouts.md from the record of the tests.

Usage: python -m tests.training.layout_table RECORD
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.training.layouts import CHECKPOINTING, ZERO_STAGES, Layout, all_layouts, matrix_cells
from tests.training.steps import MODELS


def format_tables(record: Path) -> str:
    """Returns two Markdown tables: one row per layout, and the worst ratio per ZeRO stage and checkpointing mode."""
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    # If a cell was measured twice, the later result counts.
    latest = {
        tuple(line[axis] for axis in (*Layout._fields, "zero_stage", "model", "checkpointing")): line for line in lines
    }
    by_layout: dict[Layout, list[dict[str, Any]]] = defaultdict(list)
    for line in latest.values():
        by_layout[Layout(*(line[axis] for axis in Layout._fields))].append(line)
    rows = [
        "| tensor | pipeline | data | sequence parallel | interleaved | cells run | " + " | ".join(MODELS) + " |",
        "|---" * (6 + len(MODELS)) + "|",
    ]
    for layout in all_layouts():
        found = by_layout[layout]
        flags = ["yes" if flag else "" for flag in layout[3:]]
        worst = [_worst(found, "model", model) for model in MODELS]
        cells = f"{len(found)} of {len(matrix_cells(layout))}"
        rows.append("| " + " | ".join([*map(str, layout[:3]), *flags, cells, *worst]) + " |")
    found = list(latest.values())
    rows += ["", "| | cells run | worst ratio |", "|---|---|---|"]
    for axis, values in (("zero_stage", ZERO_STAGES), ("checkpointing", CHECKPOINTING)):
        for value in values:
            number = sum(line[axis] == value for line in found)
            rows.append(f"| {axis.replace('_', ' ')} {value} | {number} | {_worst(found, axis, value)} |")
    return "\n".join(rows)


def _worst(lines: list[dict[str, Any]], axis: str, value: Any) -> str:
    ratios = [line["ratio"] for line in lines if line[axis] == value]
    return f"{max(ratios):.2f}" if ratios else "not run"


if __name__ == "__main__":
    print(format_tables(Path(sys.argv[1])))
