"""Tests that both implementations of windows compute the same, and that the benchmark writes its figures."""

import json
from pathlib import Path

import pytest
import torch

from beit3_ds.benchmarks.dense.benchmark import MEASURES
from beit3_ds.benchmarks.dense.windows import PaddedBlocks, build_packed, measure_windows
from beit3_ds.cli.main import main
from beit3_ds.data.packing import pack_grids
from beit3_ds.model.dense.canvas import to_canvas


def test_both_sides_compute_the_same_where_windows_divide() -> None:
    model, grids = build_packed(2), ((28, 14),) * 2
    batch = pack_grids([torch.zeros(3, 448, 224)] * 2, 16)
    x_TD = torch.randn(batch.num_rows, 192, generator=torch.Generator().manual_seed(0))
    ours = to_canvas(model.run_layers(batch, x_TD, range(1, 3)), grids, 14)
    theirs = PaddedBlocks(model)(to_canvas(x_TD, grids, 14).permute(0, 2, 3, 1))
    torch.testing.assert_close(ours.permute(0, 2, 3, 1), theirs, rtol=1e-5, atol=1e-5)


def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_small(rounds: int) -> dict:
        return measure_windows(rounds, ((4, 3),), 1)

    monkeypatch.setitem(MEASURES, "windows", measure_small)
    out = tmp_path / "figures.json"
    assert main(["bench", "dense", "--parts", "windows", "--rounds", "1", "--json", str(out)]) == 0
    summary = json.loads(out.read_text())["summary"]
    assert summary["ratio_window_attention"] > 0 and summary["ratio_coco_eval"] is None
