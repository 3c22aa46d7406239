"""Tests that `beit3 check` and the start of a run refuse the same runs before they read data."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.config import ConfigError, RunConfig, build_run_config
from beit3_ds.train import check_start
from beit3_ds.training.dry_run import describe_dry_run
from tests.run_config import small_run_mapping


def config(folder: Path, **deepspeed: Any) -> RunConfig:
    mapping = small_run_mapping(1) | deepspeed
    mapping["beit3_ds"]["training"]["output_dir"] = str(folder)
    return build_run_config(mapping)


def check(run: RunConfig) -> None:
    describe_dry_run(run, 1)


def start(run: RunConfig) -> None:
    check_start(run)


@pytest.fixture(autouse=True)
def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a machine that lacks the monitors' packages."""
    find = importlib.util.find_spec
    absent = ("wandb", "tensorboard")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in absent else find(name, *more))


@pytest.mark.parametrize("begin", [check, start])
@pytest.mark.parametrize("monitor", ["wandb", "tensorboard"])
def test_a_monitor_without_its_package_is_refused(
    monitor: str, begin: Callable[[RunConfig], None], tmp_path: Path
) -> None:
    """Catches DeepSpeed's ImportError on rank 0 alone, while other ranks wait for rank 0."""
    with pytest.raises(ConfigError, match=f"needs the package {monitor}, which is not installed. Run: pip install"):
        begin(config(tmp_path, **{monitor: {"enabled": True}}))
    check(config(tmp_path, **{monitor: {"enabled": False}}))


@pytest.mark.parametrize("begin", [check, start])
def test_an_output_folder_that_cannot_be_written_is_refused(begin: Callable[[RunConfig], None], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir=.*/file/run cannot be written: .*/file is not a folder"):
        begin(config(tmp_path / "file" / "run"))
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"/link is not a folder"):
        begin(config(tmp_path / "link"))


@pytest.mark.parametrize("begin", [check, start])
def test_kernels_that_are_not_built_are_refused(begin: Callable[[RunConfig], None], tmp_path: Path) -> None:
    run = config(tmp_path)
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, kernel_backend="cuda"))
    with pytest.raises(ConfigError, match=r'kernel_backend="cuda" needs'):
        begin(run)


def test_check_creates_nothing(tmp_path: Path) -> None:
    check(config(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


def test_keys_without_effect_are_named(tmp_path: Path) -> None:
    """Catches keys that have no effect and that users mistake for working settings."""
    zero = {"stage": 1, "stage3_max_live_parameters": 1, "overlap_comm": True}
    text = describe_dry_run(config(tmp_path, zero_optimization=zero), 1)
    (line,) = (line for line in text.splitlines() if line.startswith("no effect"))
    assert line.split(maxsplit=2)[2] == "in ZeRO stage 1: zero_optimization.stage3_max_live_parameters"
    assert "no effect" not in describe_dry_run(config(tmp_path), 1)
