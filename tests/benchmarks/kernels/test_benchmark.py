"""Tests that the tables of the kernel benchmark are complete, and that kernels and baselines compute the same."""

import csv
from pathlib import Path

import pytest
import torch

from beit3_ds.benchmarks.kernels import benchmark as bench
from beit3_ds.benchmarks.kernels.benchmark import Ceilings, benchmark_kernels
from beit3_ds.benchmarks.kernels.case import Problem
from beit3_ds.benchmarks.kernels.roofline import GPU, find_gpu
from beit3_ds.config import ConfigError


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_ROUNDS", {"cpu": 2, "cuda": 2})
    monkeypatch.setattr(bench, "_WARMUP", {"cpu": 0, "cuda": 1})
    monkeypatch.setattr(bench, "_measure_ceilings", lambda device, dtype: Ceilings(1e11, 1e10))


def test_table_and_csv(quick: None, tmp_path: Path) -> None:
    out = tmp_path / "kernels.csv"
    report = benchmark_kernels(["tiny"], 1, torch.float32, "h100-sxm", str(out))
    with open(out, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    ours = {(row["op"], row["direction"]) for row in rows if row["implementation"] == "beit3_ds"}
    assert ours == {(op, d) for op in {row["op"] for row in rows} for d in ("forward", "backward", "both")}
    names = {"packed_attention", "multiway FFN", "multiway layer norm", "linear_cross_entropy"}
    assert {op for op, _ in ours} == names
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert 0 < float(row["modelled_floor_ms"]) < float(row["median_ms"])
        assert row["torch"] == torch.__version__ and row["device"]
    assert "modelled floor on h100-sxm (ms)" in report
    if not torch.cuda.is_available():
        assert "No CUDA device" in report
        assert "packed_attention: torch varlen is absent (it has kernels for half precision on a GPU only)" in report


def test_a_baseline_that_computes_something_else_is_an_error() -> None:
    x = torch.ones(3, requires_grad=True)

    def problem(factor: float) -> Problem:
        return Problem((x,), lambda: x * factor, torch.ones(3), lambda y: y)

    bench._compare({"ours": problem(1), "same": problem(1.001)})
    with pytest.raises(AssertionError, match=r"other differs from ours by 0\.1"):
        bench._compare({"ours": problem(1), "other": problem(1.1)})


def test_roofline() -> None:
    gpu = GPU(half_flops=100, float32_flops=10, bandwidth=5)
    assert gpu.floor_seconds(100, 1, torch.bfloat16) == 1
    assert gpu.floor_seconds(100, 1, torch.float32) == 10
    assert gpu.floor_seconds(100, 50, torch.bfloat16) == 10
    with pytest.raises(ConfigError, match="'h1000' is not one of 'a100-80gb'"):
        find_gpu("h1000")
