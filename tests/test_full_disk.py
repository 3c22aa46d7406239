"""Tests runs whose disk fills, becomes read-only and works again, and whose output is not read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from beit3_ds.checkpoint.folder import CheckpointFolder
from beit3_ds.checkpoint.index import KINDS
from beit3_ds.checkpoint.slices import whole_slice
from beit3_ds.training.metrics_log import MetricsLog
from tests.disk_faults import FILLER
from tests.run_config import visual_tokenizer_mapping

STEPS = 24
SIZE = "30m"
FAULTS = {3: "fill", 8: "free", 11: "read-only", 15: "writable", 18: "fill", 21: "free"}
FULL_DISK = {3: "fill", 8: "free", 18: "fill", 21: "free"}
"""Faults by step; they also affect the run's own output if it is an open file on the disk."""


def _can_mount() -> bool:
    trial = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(trial, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _can_mount(), reason="needs root, unshare and mount"),
]


def write_config(folder: Path, ranks: int) -> Path:
    mapping = visual_tokenizer_mapping(folder / "disk", STEPS)
    mapping["zero_optimization"] = {"stage": 1}
    mapping |= {"csv_monitor": {"enabled": True}, "tensorboard": {"enabled": True}}
    mapping["beit3_ds"]["parallel"] = {"timeout_seconds": 120}
    mapping["beit3_ds"]["training"] |= {"eval_interval": 6}
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps(mapping))
    return path


def run(folder: Path, ranks: int, faults: dict[int, str], redirection: str) -> subprocess.CompletedProcess[str]:
    """Trains on a tmpfs and copies its files to `FOLDER/kept`; returns the result with the run's exit status."""
    config, disk = write_config(folder, ranks), folder / "disk"
    disk.mkdir()
    arguments = ["tests.disk_faults", str(disk), json.dumps(faults), str(config)]
    program = [sys.executable, "-m", *arguments]
    if ranks > 1:
        port = str(29500 + os.getpid() % 1000)
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        program = [deepspeed, "--num_gpus", str(ranks), "--master_port", port, "--module", *arguments]
    script = (
        f'mount -t tmpfs -o size={SIZE} none "$0" && set -o pipefail && {{ "$@" {redirection}; status=$?; }}; '
        f'cp -a "$0" "{folder}/kept"; exit $status'
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    # DeepSpeed's launcher ends with status 120 if its own last output cannot be flushed, unless nothing is buffered.
    environment |= {"PYTHONUNBUFFERED": "1" if ranks > 1 else ""}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["unshare", "--mount", "bash", "-c", script, str(disk), *program]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)


def read_state(folder: Path) -> dict[str, Tensor]:
    """Returns weights, moments and buffers of the last checkpoint."""
    checkpoint = CheckpointFolder(folder / "kept" / "run" / "checkpoints" / f"step-{STEPS:08d}")
    names = [(kind, name) for kind in KINDS for name in checkpoint.names()]
    state = {
        f"{name} {kind}": checkpoint.read_kind(kind, name, whole_slice(checkpoint.shape(name))) for kind, name in names
    }
    return state | {name: checkpoint.read_buffer(name) for name in checkpoint.index.buffers}


def figures(folder: Path) -> list[dict[str, Any]]:
    """Returns the records without measured times; records of checkpoints are reduced to their steps."""
    names = ("step", "kind", "feature_distance", "commitment", "loss", "grad_norm", "codes_used", "code_perplexity")
    records = MetricsLog(folder / "kept" / "run" / "metrics.jsonl").records()
    return sorted(
        ({name: record[name] for name in names if name in record} for record in records),
        key=lambda record: (record["step"], record["kind"]),
    )


def check_same(found: Path, expected: Path) -> None:
    ours, theirs = read_state(found), read_state(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert figures(found) == figures(expected)
    raw = (found / "kept" / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(raw) == len(figures(expected)) and all(map(json.loads, raw))
    logs = Path("kept") / "run" / "logs"
    for table in (expected / logs / "csv").glob("*_loss.csv"):
        assert (found / logs / "csv" / table.name).read_bytes() == table.read_bytes()
    for table in (expected / logs / "csv").glob("*.csv"):
        rows = (found / logs / "csv" / table.name).read_text().splitlines()
        assert len(rows) == len(table.read_text().splitlines())
    losses = []
    for folder in (found, expected):
        events = EventAccumulator(str(folder / logs / "tensorboard")).Reload().Scalars("train/loss")
        losses.append([(event.step, event.value) for event in events])
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    assert names_of_files(found) - {"train.log", FILLER} == names_of_files(expected)


def names_of_files(folder: Path) -> set[str]:
    """Returns the names of a run's files, without checkpoints and event files.

    Names of event files contain a time and a process id.
    """
    kept = folder / "kept"
    names = {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()}
    return {name for name in names if "tfevents" not in name and "checkpoints" not in name}


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two ranks"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run(folder, request.param, {}, "")
    assert done.returncode == 0, done.stdout + done.stderr
    return request.param, folder


@pytest.mark.parametrize("redirection", ["", "> /dev/full", "> /dev/full 2>&1", "| true", "2>&1 | head -1"])
def test_a_disk_that_fails_meanwhile_changes_nothing(
    redirection: str, undisturbed: tuple[int, Path], tmp_path: Path
) -> None:
    """Catches a run that ends at the next line of its log, and lines, rows or events that are lost."""
    ranks, expected = undisturbed
    done = run(tmp_path / "run", ranks, FAULTS, redirection)
    assert done.returncode == 0, done.stdout + done.stderr
    check_same(tmp_path / "run", expected)
    if not redirection:
        # The page that a file has begun may have room for some lines more.
        assert 1 <= done.stdout.count("metrics.jsonl cannot be written: No space left on device") <= 2
        assert done.stdout.count("metrics.jsonl cannot be written: Read-only file system") == 1
        assert 2 <= done.stdout.count("metrics.jsonl is complete again") <= 3
        assert "Traceback" not in done.stdout + done.stderr
        assert "was not written" in done.stdout  # checkpoints in between


def test_output_on_the_full_disk_is_complete(undisturbed: tuple[int, Path], tmp_path: Path) -> None:
    ranks, expected = undisturbed
    done = run(tmp_path / "run", ranks, FULL_DISK, f"> {tmp_path}/run/disk/train.log 2>&1")
    assert done.returncode == 0, done.stdout + done.stderr
    check_same(tmp_path / "run", expected)
    lines = (tmp_path / "run" / "kept" / "train.log").read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == [
        f"{step}/{STEPS}" for step in range(1, STEPS + 1)
    ]
