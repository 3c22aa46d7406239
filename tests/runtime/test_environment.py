"""Tests that wrong environment variables are refused in one line before a library fails on them."""

import os
import subprocess
import sys

import pytest

from beit3_ds.config import ConfigError
from beit3_ds.runtime.environment import check_this_machine, check_variables


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("OMP_NUM_THREADS", value) for value in ("abc", "", "0", "-1", "1.5", "\u0663", "4000000000", "2,x")],
        *[("DS_ACCELERATOR", value) for value in ("", "gpu", "CUDA", "\x1b[2J")],
    ],
)
def test_values_that_no_machine_accepts(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"environment: {name}=") as refused:
        check_variables({name: value})
    assert str(refused.value).isprintable()


def test_usual_values_pass() -> None:
    check_variables({})
    check_variables({"OMP_NUM_THREADS": "4,2", "DS_ACCELERATOR": "cpu"})
    check_this_machine({"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"})


def test_an_interface_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"GLOO_SOCKET_IFNAME names 'ib9', but the network interfaces .* lo"):
        check_this_machine({"GLOO_SOCKET_IFNAME": "lo,ib9"})


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"DS_ACCELERATOR=cuda, but host .* has no CUDA device"):
        check_this_machine({"DS_ACCELERATOR": "cuda"})


def test_commands_answer_at_once() -> None:
    """Catches a check that comes after the import of DeepSpeed, which raises."""
    command = [sys.executable, "-m", "beit3_ds.cli.main", "train", "config.json"]
    done = subprocess.run(command, env={**os.environ, "DS_ACCELERATOR": "gpu"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(
        "error: environment: DS_ACCELERATOR='gpu' is none of DeepSpeed's accelerators: cuda, cpu"
    )


@pytest.mark.parametrize("module", ["beit3_ds.train", "beit3_ds.evaluate"])
def test_a_program_ends_in_one_line_before_deepspeed_is_imported(module: str) -> None:
    """Checks the error for a variable on which DeepSpeed raises during its import."""
    environment = os.environ | {"DS_ACCELERATOR": "abc", "RANK": "3"}
    ended = subprocess.run(
        [sys.executable, "-m", module, "config.json"], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(
        "error on rank 3: environment: DS_ACCELERATOR='abc' is none of DeepSpeed's accelerators: cuda, "
    )
