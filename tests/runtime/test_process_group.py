"""Tests that a rank that dies, stops, fails or disagrees ends the run on all ranks, with a line that names it."""

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.preloaded import start_module

TIMEOUT_SECONDS = 8  # parallel.timeout_seconds of the runs here
BOUND_SECONDS = 30


def start_ranks(
    mapping: dict[str, Any],
    folder: Path,
    extra: dict[int, list[str]] | None = None,
    modules: tuple[str, str] = ("beit3_ds.train", "beit3_ds.train"),
) -> list[Any]:
    """Starts two pipeline stages, one process each, as a launcher does; each rank writes its output to a file."""
    mapping["gradient_accumulation_steps"] = 2
    mapping["beit3_ds"]["training"] |= {"total_steps": 1000, "eval_interval": 1000, "save_interval": 1000}
    mapping["beit3_ds"]["parallel"] = {"pipeline_parallel_size": 2, "timeout_seconds": TIMEOUT_SECONDS}
    config = folder / "config.json"
    config.write_text(json.dumps(mapping))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in names.items()}, "MASTER_ADDR": "127.0.0.1"}
        arguments = [config, *(extra or {}).get(rank, [])]
        with open(folder / f"rank{rank}.log", "w") as log:
            ranks.append(start_module(modules[rank], arguments, env=environment, output=log))
    return ranks


def wait_for_step(folder: Path, ranks: list[Any]) -> None:
    deadline = time.monotonic() + 60
    while "step 2/" not in (folder / "rank0.log").read_text():
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks), read_logs(folder)
        time.sleep(0.1)


def read_logs(folder: Path) -> list[str]:
    return [(folder / f"rank{rank}.log").read_text() for rank in range(2)]


def end(ranks: list[Any]) -> None:
    for rank in ranks:
        rank.kill()
        rank.wait()


@pytest.mark.parametrize(
    ("lost", "blow"),
    [
        (1, signal.SIGSTOP),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_lost_rank_is_named(run_mapping: dict[str, Any], tmp_path: Path, lost: int, blow: int) -> None:
    """Catches a surviving rank that waits forever, and a message that names the wrong rank."""
    ranks = start_ranks(run_mapping, tmp_path)
    try:
        wait_for_step(tmp_path, ranks)
        os.kill(ranks[lost].pid, blow)
        status = ranks[1 - lost].wait(timeout=BOUND_SECONDS + TIMEOUT_SECONDS)
        line = next(line for line in read_logs(tmp_path)[1 - lost].splitlines() if "error on rank" in line)
        assert status == 1
        assert f"rank {lost} (stage {lost}, data-parallel rank 0, tensor-parallel rank 0, host" in line
        assert "does not answer" in line
    finally:
        end(ranks)


def test_ranks_with_different_configurations_are_refused(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    ranks = start_ranks(run_mapping, tmp_path, {1: ["--set", "training.seed=2"]})
    try:
        assert [rank.wait(timeout=60) for rank in ranks] == [2, 2]
        assert all("started with another configuration than rank 0 (host" in log for log in read_logs(tmp_path))
    finally:
        end(ranks)


def test_a_failing_rank_is_named_on_the_others(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    ranks = start_ranks(run_mapping, tmp_path, modules=("tests.failing_rank", "beit3_ds.train"))
    try:
        assert [rank.wait(timeout=60) for rank in ranks] == [1, 1]
        first, second = read_logs(tmp_path)
        assert "LookupError: a planted fault at step" in first
        assert "rank 0 (stage 0" in second and "failed: LookupError: a planted fault at step" in second
    finally:
        end(ranks)
