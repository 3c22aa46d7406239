"""Tells a GPU, a CPU and an emulated GPU apart, on which sections have different sizes."""

from typing import Literal

import torch

from beit3_ds.kernels.triton.architecture import EMULATED

Kind = Literal["cuda", "cpu", "dry"]
"""A GPU, a CPU, or a CPU that emulates a GPU in a dry run."""


def kind_of(device: torch.device) -> Kind:
    """Returns the kind of a device; a CPU is an emulated GPU inside `dry_run`."""
    if device.type == "cuda":
        return "cuda"
    return "cpu" if EMULATED.architecture is None else "dry"
