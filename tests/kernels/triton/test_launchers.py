"""Tests that launchers in C, which Triton 3.6 builds at a kernel's first launch, are cached beforehand."""

from pathlib import Path

import pytest
import torch
from triton.backends.nvidia import driver

from beit3_ds.kernels.triton.expert_rows_launch import deal_rows, prepare_sum
from beit3_ds.kernels.triton.fake_driver import fake_gpu
from beit3_ds.kernels.triton.launchers import store_launcher

builds_launchers = hasattr(driver, "make_launcher")


def launch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Launches one kernel on an emulated GPU; returns the number of launchers that were built."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    programs = deal_rows((4, 8), 8)
    with fake_gpu(90, compiles=True) as gpu:
        prepare_sum(programs, 1, 2, 64, torch.bfloat16)(torch.zeros(1, programs.num_programs, 64))
    return gpu.num_launchers


@pytest.mark.skipif(not builds_launchers, reason="this version of Triton has one launcher for all kernels")
def test_a_launcher_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a launcher whose key or name differs from Triton's, which would be built again on the GPU."""
    assert launch(tmp_path, monkeypatch) == 1
    names = {path.name.split(".")[0] for path in tmp_path.rglob("*.so")}
    assert names == {"__triton_launcher", "cuda_utils"}
    assert launch(tmp_path, monkeypatch) == 0


@pytest.mark.skipif(builds_launchers, reason="this version of Triton builds a launcher per signature")
def test_newer_versions_need_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not store_launcher(None, None)
    assert launch(tmp_path, monkeypatch) == 0
