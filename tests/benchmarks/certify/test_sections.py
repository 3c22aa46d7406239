"""Tests the sections of `beit3 certify` on a CPU, also without optional packages."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_ds.benchmarks.certify import correctness, layouts, profile
from beit3_ds.benchmarks.certify.clock import Clock
from beit3_ds.benchmarks.certify.commands import ROOT
from beit3_ds.benchmarks.certify.plan import PLAN
from beit3_ds.cli.main import build_parser

_WITHOUT_PACKAGES = """
import importlib, importlib.abc, sys
from pathlib import Path

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepspeed", "hjson", "pydantic", "zstandard", "webdataset", "torchscale"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from beit3_ds.benchmarks.certify.machine import describe_machine
from beit3_ds.benchmarks.certify.plan import PLAN
from beit3_ds.benchmarks.certify.section import run_section
from beit3_ds.cli.main import build_parser
build_parser().parse_args(["certify"])
import beit3_ds.benchmarks.certify.runner
for section in PLAN:
    importlib.import_module(section.module)
print(describe_machine()["absent"])
for name in ("engine", "profile"):
    run_section(name, f"beit3_ds.benchmarks.certify.{name}", Path(sys.argv[1]), 1)
"""


def test_without_packages(tmp_path: Path) -> None:
    """Catches a section, or a command, that fails because an optional package is missing."""
    command = [sys.executable, "-c", _WITHOUT_PACKAGES, str(tmp_path / "results.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for package in ("deepspeed", "torchscale", "zstandard", "webdataset"):
        assert package in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines[0] == {"section": "engine", "status": "absent: deepspeed", "call": 1}
    if not torch.cuda.is_available():
        assert lines[1] == {"section": "profile", "status": "needs a CUDA device", "call": 1}


def check(op: correctness.Op, is_aligned: bool = True) -> dict[str, Any]:
    return correctness._check(op, torch.device("cpu"), torch.float32, "auto", is_aligned)


def test_correctness_finds_wrong_results_and_unequal_bits() -> None:
    op = correctness._linear(133, 16)
    assert check(op) == check(op, is_aligned=False) == {"passed": True, "equal_bits": True}
    wrong = check(op._replace(ours=lambda *inputs: op.ours(*inputs) * 1.01))
    assert not wrong["passed"] and wrong["wrong"].startswith("y: error")
    calls: list[None] = []

    def unequal(*inputs: Tensor) -> Tensor:
        calls.append(None)
        return op.ours(*inputs) * (1 + 2e-7 * (len(calls) % 2))

    assert check(op._replace(ours=unequal)) == {"passed": False, "equal_bits": False}


def test_an_unaligned_copy_is_unaligned() -> None:
    x = torch.randn(3, 4)
    for is_aligned in (True, False):
        placed = correctness._place(x, torch.device("cpu"), torch.float32, is_aligned)
        assert torch.equal(placed, x) and (placed.data_ptr() % 16 == 0) == is_aligned


@pytest.mark.parametrize("small", [True, False])
def test_ops_are_distinct(small: bool) -> None:
    """Catches two ops with the same name; only the first would run."""
    names = [op.name for op in correctness._ops(small)]
    assert len(set(names)) == len(names)
    checks = [name for name, _ in correctness._kernel_checks(torch.device("cpu"))]
    assert len(set(checks)) == len(checks) and len(checks) > 40


def test_idle_share() -> None:
    assert profile.idle_share([(4.0, 6.0), (0.0, 1.0), (0.5, 2.0), (5.0, 10.0)]) == pytest.approx(0.2)
    assert profile.idle_share([(0.0, 10.0), (2.0, 3.0), (4.0, 5.0)]) == 0


def test_clock_leaves_out_preparation() -> None:
    arguments: list[int] = []

    def prepare() -> int:
        arguments.append(len(arguments))
        return arguments[-1]

    called: list[int] = []
    timing = Clock(torch.device("cpu")).time(called.append, 4, prepare)
    assert called == arguments == list(range(7)) and len(timing.milliseconds) == 4


@pytest.mark.parametrize("num_gpus", [1, 2, 7, 8])
def test_commands_of_layouts_exist(num_gpus: int, tmp_path: Path) -> None:
    """Catches a printed command with an unknown option or a file that does not exist."""
    planned = layouts.plan_commands(tmp_path, num_gpus)
    for commands in planned.values():
        for command in commands:
            if command[2] == "beit3_ds.cli.main":
                build_parser().parse_args(command[3:])
            assert all((ROOT / part).exists() for part in command if part.startswith("ds_configs/"))
    divided = {2: "one GPU beside 2", 7: "one GPU beside 4", 8: "one GPU beside 8"}
    assert [name[:16] for name in planned] == ["one GPU under Ze", *([divided[num_gpus]] if num_gpus > 1 else [])]


@pytest.mark.slow
def test_the_whole_plan_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "beit3_ds.cli.main", "certify", "--out", str(tmp_path / "out")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    content = json.loads((tmp_path / "out" / "certificate.json").read_text())
    statuses = {section["name"]: section["status"] for section in content["sections"]}
    assert list(statuses) == [section.name for section in PLAN] and content["ok"]
    needs = {name for name, status in statuses.items() if status == "needs a CUDA device"}
    assert needs >= {"profile", "layouts", "tests"} and needs <= {"profile", "layouts", "tests", "engine"}
