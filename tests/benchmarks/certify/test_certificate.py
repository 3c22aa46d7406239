"""Tests the report about a machine: its commands exist, and a failing step shows."""

import json
import sys
from pathlib import Path

import pytest
import torch

from beit3_ds.benchmarks.certify import certificate, parity
from beit3_ds.benchmarks.certify.certificate import Step, certify, plan_steps
from beit3_ds.cli.main import build_parser
from beit3_ds.config import ConfigError

MACHINE = {"devices": ["none"], "torch": torch.__version__}


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(certificate, "describe_machine", lambda: MACHINE)


def step(name: str, code: str, figures: str | None = None) -> Step:
    return Step(name=name, commands=((sys.executable, "-c", code),), figures=figures)


def test_without_a_device_it_says_what_it_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert certify(tmp_path / "out") == 1
    printed = capsys.readouterr().out
    assert "No CUDA device: nothing is certified" in printed
    for expected in (
        "-m gpu",
        "opcheck",
        "beit3_ds.benchmarks.certify.parity",
        "bench kernels",
        "bench train",
        "deepspeed",
    ):
        assert expected in printed
    assert not (tmp_path / "out").exists()


def test_report(one_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a failing step that hides or stops other steps."""
    figures = f"import pathlib; pathlib.Path({str(tmp_path)!r}, 'out', 'f.json').write_text('[1.5]')"
    steps = [step("good", "print('all well')"), step("bad", "print('oh'); raise SystemExit(3)"), step("f", figures)]
    steps[2] = Step(name="figures", commands=steps[2].commands, figures="f.json")
    monkeypatch.setattr(certificate, "plan_steps", lambda folder, num_gpus: steps)
    out = tmp_path / "out"
    assert certify(out) == 1
    report = json.loads((out / "certificate.json").read_text())
    assert report["machine"] == MACHINE
    assert [(entry["name"], entry["passed"]) for entry in report["steps"]] == [
        ("good", True),
        ("bad", False),
        ("figures", True),
    ]
    assert report["steps"][1]["tail"] == "oh"
    assert report["steps"][2]["figures"] == [1.5]
    text = (out / "certificate.md").read_text()
    assert "| bad | **FAILED** |" in text and "all well" in text
    with pytest.raises(ConfigError, match="is not empty"):
        certify(out)
    assert certify(tmp_path / "again", only=["goo"]) == 0
    with pytest.raises(ConfigError, match="no step is called 'nothing'; there are 'good', 'bad', 'figures'"):
        certify(tmp_path / "third", only=["nothing"])


def test_a_step_ends_at_its_first_failing_command(tmp_path: Path) -> None:
    fail, never = (sys.executable, "-c", "raise SystemExit(1)"), (sys.executable, "-c", "print('went on')")
    result = certificate.run_step(Step(name="a", commands=(fail, never)), tmp_path)
    assert not result.passed and "went on" not in result.tail


@pytest.mark.parametrize("num_gpus", [1, 2, 7, 8])
def test_planned_commands_exist(num_gpus: int, tmp_path: Path) -> None:
    """Catches an option that the command line does not have, and files that do not exist."""
    names = set()
    for planned in plan_steps(tmp_path, num_gpus):
        names.add(planned.name)
        for command in planned.commands:
            if Path(command[0]).name == "beit3":
                build_parser().parse_args(command[1:])
            for part in command:
                if part.endswith(".json") and part.startswith("ds_configs/"):
                    assert (certificate.ROOT / part).exists()
    divided = {
        1: "training on one GPU under ZeRO-3",
        2: "one GPU beside 2",
        7: "one GPU beside 4",
        8: "one GPU beside 8",
    }
    assert any(name.startswith(divided[num_gpus]) for name in names)


def test_parity_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parity, "_LAYOUTS", {"shared": parity._LAYOUTS["shared, sub-LN"]})
    monkeypatch.setattr(parity, "_DTYPES", (torch.float32,))
    monkeypatch.setattr(parity, "_SIZES", {**parity._SIZES, "num_layers": 1})
    assert parity.main(str(tmp_path / "parity.json")) == 0
    (row,) = json.loads((tmp_path / "parity.json").read_text())
    assert row["passed"] and 0 < row["gradient_error"] < 1e-4

    right, calls = parity._step, []

    def wrong_on_the_device(*arguments: object) -> tuple[float, torch.Tensor]:
        calls.append(arguments)
        loss, gradient = right(*arguments)  # type: ignore[arg-type]
        return loss, gradient * 1.001 if len(calls) == 3 else gradient

    monkeypatch.setattr(parity, "_step", wrong_on_the_device)
    assert parity.main(str(tmp_path / "parity.json")) == 1
