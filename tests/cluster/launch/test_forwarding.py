"""Tests that only variables that configure ranks, or that the user names, are forwarded."""

from pathlib import Path
from typing import Any

import pytest

from beit3_ds.cluster.launch.forwarding import describe_forwarded, forwarded_environment
from beit3_ds.config import ConfigError


def test_forwarded_environment() -> None:
    here = {
        "NCCL_DEBUG": "INFO",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": "/x",
        "LD_LIBRARY_PATH": "/lib",
        "CUDA_VISIBLE_DEVICES": "3",  # of this machine
        "HOME": "/root",
        "SLURM_PROCID": "0",
        "TOKEN": "secret",
        "HF_TOKEN": "secret",  # beside HF_HOME, which is forwarded
        "MLFLOW_TRACKING_PASSWORD": "secret",
        "NCCL_SECRET": "secret",
        "PYTHON_TOKEN": "secret",
    }
    forwarded: dict[str, Any] = {name: here[name] for name in list(here)[:4]}
    assert forwarded_environment(here) == forwarded
    wanted = ["TOKEN", "EMPTY=", "EQUATION=a=b", "NCCL_DEBUG=WARN"]
    more = {"TOKEN": "secret", "EMPTY": "", "EQUATION": "a=b", "NCCL_DEBUG": "WARN"}
    assert forwarded_environment(here, wanted) == forwarded | more
    for wrong in ("NOT_THERE", "A B=1", "=1", ""):
        with pytest.raises(ConfigError, match="--env"):
            forwarded_environment(here, [wrong])
    with pytest.raises(ConfigError) as refused:
        forwarded_environment(here, ["A B=secret"])
    assert "secret" not in str(refused.value)


def test_values_are_shown_only_of_variables_that_hold_no_secrets() -> None:
    lines = describe_forwarded({"WANDB_API_KEY": "secret", "NCCL_DEBUG": "INFO\x1b[2J", "NCCL_NEW": "secret"})
    assert lines == ["NCCL_DEBUG=INFO\\x1b[2J", "NCCL_NEW (value not shown)", "WANDB_API_KEY (value not shown)"]


@pytest.mark.parametrize("line", ["export", "A-B=secret", "=secret"])
def test_deepspeeds_file_is_read_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Catches DeepSpeed's own reading of its environment file, which puts the values on shell lines."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("# ours\n\nMY_NAME= $(touch x) \nNCCL_DEBUG=INFO\n")
    assert forwarded_environment({}) == {"MY_NAME": "$(touch x)", "NCCL_DEBUG": "INFO"}
    (tmp_path / ".deepspeed_env").write_text(f"NCCL_DEBUG=INFO\n{line}\n")
    with pytest.raises(ConfigError, match=r"\.deepspeed_env, line 2 is not NAME=VALUE") as refused:
        forwarded_environment({})
    assert "secret" not in str(refused.value)
