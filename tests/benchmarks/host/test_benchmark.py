"""Tests that the host benchmark times layers and steps, and checks its output."""

import json
from pathlib import Path

import pytest

from beit3_ds.benchmarks.host import benchmark
from beit3_ds.benchmarks.host.layers import layer_models, time_layer
from beit3_ds.benchmarks.host.zero3 import NUM_LAYERS, deep_config


@pytest.mark.parametrize("name", layer_models())
def test_layers_launch_kernels(name: str) -> None:
    """Catches layers that run PyTorch's operations instead of kernels, and launch counts that include tuning."""
    times = time_layer(layer_models()[name], rounds=1)
    assert 5 <= times.forward_launches == int(times.forward_launches) < times.backward_launches
    assert times.total_ms == pytest.approx(times.forward_ms + times.backward_ms) and times.forward_ms > 0


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [(0.2, 0.3), (0.4, 0.5)]
    steps = [{"without ZeRO": {"cpu_seconds": plain}, "ZeRO-3": {"cpu_seconds": zero3}} for plain, zero3 in seconds]
    monkeypatch.setattr(benchmark, "_time_steps", lambda rounds: steps)
    report = benchmark.benchmark_host(1, str(tmp_path / "host.json"))
    summary = json.loads((tmp_path / "host.json").read_text())["summary"]
    assert summary["zero3_ratio"] == pytest.approx((1.5 + 1.25) / 2)
    assert f"{summary['base_layer_ms']:.2f}" in report and f"{summary['giant_layer_ms']:.2f}" in report


def test_both_sides_train_the_same_layers() -> None:
    plain, zero3 = deep_config(0), deep_config(3)
    assert plain.model == zero3.model and plain.model.num_layers == NUM_LAYERS
    assert (plain.options.zero_stage, zero3.options.zero_stage) == (0, 3)
