"""Checks GPU kernels at their first use on a device, and disables kernels that fail, with a warning."""

import warnings
from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor

from beit3_ds.kernels.ops.current_device import make_current
from beit3_ds.kernels.ops.measured_op import CHOICES
from beit3_ds.kernels.triton.architecture import is_on_gpu

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""dtypes that the GPU kernels support. For float64, ops use PyTorch's operations."""


class TrustedKernels:
    """Decides whether an op uses its GPU kernels. The kernels must pass a check at their first use.

    The check runs once per process for each combination of device, dtype and properties, such as a width. Ranks need
    not decide alike: the kernels do not communicate, and PyTorch's operations compute the same results.
    """

    def __init__(self, op: str, check: Callable[..., None]) -> None:
        """Stores an op's name and its check, without running the check.

        Args:
            op: name of the op, for the warning.
            check: function that is called as check(device, dtype, **properties). It runs the kernels on small tensors.
                It raises an error if a kernel fails or computes a wrong result.
        """
        self._op, self._check = op, check
        self._verdicts: dict[Hashable, bool] = {}

    def accept(self, x: Tensor, **properties: Hashable) -> bool:
        """Returns whether to use the kernels for `x`.

        True if `x` is a GPU tensor of a supported dtype, and the kernels pass their check. The properties are passed to
        the check.
        """
        return is_on_gpu(x) and x.dtype in SUPPORTED_DTYPES and self.are_trusted(x.device, x.dtype, **properties)

    def are_trusted(self, device: torch.device, dtype: torch.dtype, **properties: Hashable) -> bool:
        """Returns whether the kernels pass their check. The check runs at the first call with these arguments.

        Args:
            device: device of the kernels.
            dtype: dtype that is passed to the check.
            properties: further arguments of the check, such as a width.
        """
        key = device, dtype, *properties.items()
        if key not in self._verdicts:
            described = "".join(f", {name}={value}" for name, value in properties.items())
            check = partial(self._check, device, dtype, **properties)
            with CHOICES.fixed("triton"):  # a check of an operator must not run another implementation of it
                self._verdicts[key] = passes_check(f"{self._op} in {dtype}{described}", device, check)
        return self._verdicts[key]


def passes_check(kernels: str, device: torch.device, check: Callable[[], None]) -> bool:
    """Runs a check of kernels, and returns whether it passed. If it failed, a warning gives the reason.

    Args:
        kernels: name of the kernels and purpose of the check, for the warning.
        device: device of the kernels.
        check: function that runs the kernels on small tensors. It raises an error if a kernel fails or computes a wrong
            result.
    """
    try:
        with make_current(device), torch.inference_mode(False), torch.enable_grad():
            check()
    except Exception as error:  # raised by a compiler, by a driver, or because of a wrong result
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        warnings.warn(
            f"{kernels} failed its check on {name} and is switched off: {type(error).__name__}: {error}. Plain PyTorch "
            "is used in its place, which is slower; `beit3 certify` writes a report about this machine.",
            stacklevel=2,
        )
        return False
    return True
