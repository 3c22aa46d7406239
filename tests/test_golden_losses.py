"""Losses and gradient norms of tiny runs are those recorded at version 0.1: a change of structure moves no number."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.golden.runs import LAYOUTS, LOSSES, describe_machine, run_layout

ROUNDING = 1e-5
"""Largest relative difference on another processor, or with other libraries, than the recorded ones."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_number_moves(layout: str, tmp_path: Path) -> None:
    """Every step's four terms and norm, and the evaluations before and after, bit for bit on the recorded machine."""
    golden = json.loads(LOSSES.read_text())
    tolerance = 0.0 if golden["machine"] == describe_machine() else ROUNDING
    moved = [
        f"{model}, step {expected['step']} ({expected['kind']}): {key} is {value!r}, was {expected.get(key)!r}"
        for model, records in run_layout(layout, tmp_path).items()
        for record, expected in zip(records, golden[f"{layout}, {model}"], strict=True)
        for key, value in record.items()
        if record.keys() != expected.keys() or not _is_same(value, expected[key], tolerance)
    ]
    assert not moved, "\n".join(moved)


def _is_same(value: Any, expected: Any, tolerance: float) -> bool:
    if tolerance and isinstance(value, float):
        return math.isclose(value, expected, rel_tol=tolerance)
    return bool(value == expected)
