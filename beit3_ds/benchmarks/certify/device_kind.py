"""Distinguishes three kinds of device: a GPU, a CPU, and an emulated GPU. Sizes of measurements depend on the kind."""

from typing import Literal

import torch

from beit3_ds.kernels.triton.architecture import EMULATED

Kind = Literal["cuda", "cpu", "dry"]
"""Kind of device: a GPU ("cuda"), a CPU ("cpu"), or a CPU that emulates a GPU in a dry run ("dry")."""


def kind_of(device: torch.device) -> Kind:
    """Returns the kind of a device. Inside `dry_run`, a CPU counts as an emulated GPU."""
    if device.type == "cuda":
        return "cuda"
    return "cpu" if EMULATED.architecture is None else "dry"
