"""Kernels prove themselves at their first use on a device; one that cannot is switched off, with a warning."""

import warnings
from collections.abc import Callable

import torch


def passes(op: str, device: torch.device, check: Callable[[], None]) -> bool:
    """Runs an op's check of its kernels on a device; callers keep the answer, which holds for the whole process.

    Ranks may differ in it: kernels send nothing, and both ways compute the same.

    Args:
        op: its name and what the check is for, for the warning.
        device: where the kernels run.
        check: runs them on a small case, looks at the results, and raises if they fail or are wrong.

    Returns:
        Whether the kernels are to be used; if not, a warning has said why.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            check()
    except Exception as error:  # a compiler's, a driver's, a wrong result
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        warnings.warn(
            f"{op} failed its check on {name} and is switched off: {type(error).__name__}: {error}. Plain PyTorch is "
            "used in its place, which is slower; `beit3 certify` writes a report about this machine.",
            stacklevel=2,
        )
        return False
    return True
