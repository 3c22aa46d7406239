"""Tests that only the cores count that the process may use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from beit3_ds.cores import cpu_quota, divide_cores


def test_affinity_is_heeded_by_a_rank_of_its_own() -> None:
    """Catches os.cpu_count(), which ignores the cores that a launcher assigns (taskset, srun --cpu-bind)."""
    core = min(os.sched_getaffinity(0))
    code = (
        "import torch; from beit3_ds.config import ParallelConfig; from beit3_ds.runtime.process_group import *;"
        "init_process_group(ParallelConfig()); print('threads', torch.get_num_threads())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        ["taskset", "-c", str(core), sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert "threads 1\n" in done.stdout, done.stdout + done.stderr


def cores(*numbers: int, quota: int | None = None) -> dict[str, object]:
    return {"affinity": list(numbers), "quota": quota}


def test_ranks_divide_what_they_share_and_keep_what_is_theirs() -> None:
    shared = [("a", cores(0, 1, 2, 3))] * 2
    assert divide_cores(shared) == [2, 2]
    # Bound by the launcher: divided once more, half of the cores would idle.
    assert divide_cores([("a", cores(0, 1)), ("a", cores(2, 3, 4))]) == [2, 3]
    # The same numbers on another host are other cores.
    assert divide_cores([("a", cores(0, 1)), ("b", cores(0, 1))]) == [2, 2]
    assert divide_cores([("a", cores(0))] * 3) == [1, 1, 1]
    assert divide_cores([("a", cores(*range(8), quota=4))] * 2) == [2, 2]


@pytest.mark.parametrize(
    ("files", "membership", "quota"),
    [
        ({"cpu.max": "max 100000"}, "0::/\n", None),
        ({"cpu.max": "250000 100000"}, "0::/\n", 3),
        ({"job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000"}, "0::/job/step\n", 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/\n", None),
        ({"cpu/x/cpu.cfs_quota_us": "50000", "cpu/x/cpu.cfs_period_us": "100000"}, "4:memory:/y\n1:cpu:/x\n", 1),
        ({}, "0::/not/mounted/here\n", None),
    ],
)
def test_quota_of_a_container(tmp_path: Path, files: dict[str, str], membership: str, quota: int | None) -> None:
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    (tmp_path / "cgroup").write_text(membership)
    assert cpu_quota(tmp_path / "root", tmp_path / "cgroup") == quota
