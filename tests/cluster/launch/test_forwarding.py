"""Tests that only variables that configure ranks, or that the user names, are forwarded."""

from typing import Any

import pytest

from beit3_ds.cluster.launch.forwarding import forwarded_environment
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
    }
    forwarded: dict[str, Any] = {name: here[name] for name in list(here)[:4]}
    assert forwarded_environment(here) == forwarded
    wanted = ["TOKEN", "EMPTY=", "EQUATION=a=b", "NCCL_DEBUG=WARN"]
    more = {"TOKEN": "secret", "EMPTY": "", "EQUATION": "a=b", "NCCL_DEBUG": "WARN"}
    assert forwarded_environment(here, wanted) == forwarded | more
    for wrong in ("NOT_THERE", "A B=1", "=1", ""):
        with pytest.raises(ConfigError, match="--env"):
            forwarded_environment(here, [wrong])
