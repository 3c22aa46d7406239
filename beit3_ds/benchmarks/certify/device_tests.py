"""Runs those tests of the repository that need a GPU."""

import importlib
import sys
from functools import partial

import torch

from beit3_ds.benchmarks.certify.commands import ROOT, run_commands
from beit3_ds.benchmarks.certify.recorder import NeedsDeviceError, Recorder

_PYTEST = ("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "--continue-on-collection-errors")


def measure(recorder: Recorder) -> None:
    """Runs the tests marked `gpu`, and records whether all passed."""
    if not torch.cuda.is_available():
        raise NeedsDeviceError
    importlib.import_module("pytest")  # if missing, the section reports this
    if not (ROOT / "tests" / "kernels").is_dir():
        recorder.add("tests", not_run=f"{ROOT} holds no tests; install from a clone")
        return
    tests = (sys.executable, *_PYTEST)
    recorder.measure("tests marked gpu", partial(run_commands, [(*tests, "tests", "-m", "gpu")]))
