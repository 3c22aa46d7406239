"""Compares losses and gradient norms of tiny runs with recorded values of version 0.1."""

import json
from pathlib import Path

import pytest

from tests.golden.runs import LAYOUTS, LOSSES, find_moved, run_layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_number_moves(layout: str, tmp_path: Path) -> None:
    """Compares the loss terms and norm of every step, and all evaluations.

    Values must be equal bit for bit on the recorded machine.
    """
    golden = json.loads(LOSSES.read_text())
    moved = {
        model: difference
        for model, records in run_layout(layout, tmp_path).items()
        if (difference := find_moved(records, golden[f"{layout}, {model}"]))
    }
    assert not moved, "\n".join(f"{model}, {line}" for model, lines in moved.items() for line in lines)
