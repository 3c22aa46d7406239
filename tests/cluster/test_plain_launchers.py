"""Launchers as users type them start a run across hosts, and it learns what one process learns."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.training_run import TrainingRun
from tests.hosts import Host, missing_for_hosts, write_hostfile
from tests.test_pretrain import losses, write

STEPS = 3
TOLERANCE = 1e-5
PROGRAMS = Path(sys.executable).parent


@pytest.fixture
def config(run_mapping: dict[str, Any], tmp_path: Path) -> Path:
    """A run of three steps under ZeRO-3."""
    run_mapping["beit3_ds"]["training"] |= {"total_steps": STEPS, "eval_interval": STEPS, "save_interval": STEPS}
    return write(run_mapping, tmp_path)


def needs(*programs: str) -> pytest.MarkDecorator:
    reason = missing_for_hosts(*programs)
    return pytest.mark.skipif(reason is not None, reason=reason or "")


def check_run(
    host: Host, argv: Sequence[str], mapping: dict[str, Any], folder: Path, environment: dict[str, str]
) -> str:
    """Launches a run from a host, and compares its record with that of one process; returns what it printed."""
    common = {"PATH": f"{PROGRAMS}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = host.run(argv, {**common, **environment}, timeout=300)
    assert done.returncode == 0, done.stdout
    alone = TrainingRun(mapping, folder / "alone")
    assert alone.finish() == [0], alone.output()
    ours, expected = losses(folder / "run"), losses(alone.output_dir)
    assert len(ours) == len(expected) >= STEPS
    for record, other in zip(ours, expected, strict=True):
        assert record.pop("kind") == other.pop("kind")
        assert record == pytest.approx(other, rel=TOLERANCE, abs=TOLERANCE)  # catches ranks that do not add up
    return done.stdout


@needs("pdsh")
def test_deepspeed_with_pdsh(two_hosts: list[Host], config: Path, run_mapping: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "environment").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    environment = {"DS_ENV_FILE": str(tmp_path / "environment")}  # in the place of .deepspeed_env in the working folder
    hostfile = write_hostfile(tmp_path / "hostfile", two_hosts)
    argv = ["deepspeed", "--hostfile", str(hostfile), "--module", "beit3_ds.pretrain", str(config)]
    output = check_run(two_hosts[0], argv, run_mapping, tmp_path, environment)
    assert all(f"\n{host.name}: " in output for host in two_hosts)  # pdsh says who prints: both took part
