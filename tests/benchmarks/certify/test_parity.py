"""Tests that a step with a wrong gradient fails the comparison with float64."""

from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_ds.benchmarks.certify import parity
from beit3_ds.benchmarks.certify.recorder import Recorder


def test_parity_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parity, "_LAYOUTS", {"shared": parity._LAYOUTS["shared, sub-LN"]})
    monkeypatch.setattr(parity, "_DTYPES", (torch.float32,))
    monkeypatch.setattr(parity, "_SIZES", {**parity._SIZES, "num_layers": 1})
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(Recorder, "add", lambda self, item, **figures: rows.append(figures))
    parity.measure(Recorder("parity", tmp_path / "results.jsonl", 1))
    assert rows[-1]["passed"] and 0 < rows[-1]["gradient_error"] < 1e-4

    right, calls = parity._step, []

    def wrong_on_the_device(*arguments: object) -> tuple[float, torch.Tensor]:
        calls.append(arguments)
        loss, gradient = right(*arguments)  # type: ignore[arg-type]
        return loss, gradient * 1.001 if len(calls) == 3 else gradient

    monkeypatch.setattr(parity, "_step", wrong_on_the_device)
    parity.measure(Recorder("parity", tmp_path / "results.jsonl", 1))
    assert rows[-1]["passed"] is False
