"""Selects the GPU kernels of a model."""

from torch import nn

from beit3_ds.config import Kernels
from beit3_ds.model.attention import MultiwayAttention
from beit3_ds.model.multiway import UpProjection


def select_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Sets the GPU kernel backend of every module that has a CUDA C++ kernel; "cuda" needs the built kernels."""
    for module in model.modules():
        if isinstance(module, MultiwayAttention | UpProjection):
            module.cuda_cpp = kernels == "cuda"
