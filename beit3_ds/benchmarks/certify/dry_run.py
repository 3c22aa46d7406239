"""Runs a section of `beit3 certify` on an emulated GPU: kernels are compiled but do not run.

A dry run finds errors in the sections before time on a GPU is spent. It also fills Triton's cache with compiled
kernels. Widths, dtypes and flags are the same as on a GPU, because compiled kernels depend on them. The numbers of
samples, layers and words are smaller. Expensive operations of PyTorch compute nothing (`empty_results`). All results
are undefined.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from beit3_ds.benchmarks.empty_results import empty_results
from beit3_ds.config import ConfigError
from beit3_ds.kernels.ops.choice_file import ChoiceFile
from beit3_ds.kernels.ops.measured_op import CHOICES

_NAMES = {80: "A100", 90: "H100", 100: "B200"}


class _Event:
    """Replaces `torch.cuda.Event`; every measured time is 1 ms."""

    def __init__(self, enable_timing: bool = False) -> None:
        """Accepts the argument of `torch.cuda.Event`, and ignores it."""

    def record(self) -> None:
        """Does nothing."""

    def synchronize(self) -> None:
        """Does nothing."""

    def elapsed_time(self, end: "_Event") -> float:
        """Returns 1 ms."""
        return 1.0


def _call_once(call: Callable[[], Any]) -> float:
    call()
    return 1.0


@contextmanager
def dry_run(architecture: int) -> Iterator[None]:
    """Emulates a GPU inside a `with` block, by replacing functions of `torch.cuda`.

    Args:
        architecture: compute capability of the emulated GPU: 80, 90 or 100.

    Raises:
        ConfigError: if Triton is not installed.
    """
    try:
        from beit3_ds.kernels.triton.fake_driver import fake_gpu
    except ModuleNotFoundError:
        raise ConfigError("certify: --dry-run needs Triton, which comes with torch's builds for GPUs.") from None

    replaced = {
        **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats"), lambda *_: None),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated"), lambda *_: 0),
        "get_device_name": lambda *_: f"dry run of NVIDIA {_NAMES[architecture]}",
        "Event": _Event,
    }
    with ExitStack() as stack:
        for name, replacement in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, replacement))
        stack.enter_context(mock.patch.object(CHOICES, "_time", _call_once))
        stack.enter_context(mock.patch.object(CHOICES, "_open_file", return_value=ChoiceFile("", None)))
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        stack.enter_context(empty_results())
        stack.enter_context(fake_gpu(architecture, compiles=True))
        yield
