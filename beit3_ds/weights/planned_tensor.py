"""Plans the tensors of a file; each tensor is read or computed only when it is written."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.config import ConfigError
from beit3_ds.weights.reader import WeightReader


class PlannedTensor(NamedTuple):
    """A tensor to write, which is built only when it is written; memory then holds one tensor at a time."""

    name: str
    """Name of the tensor in the file."""
    dtype: torch.dtype
    """Dtype of the built tensor."""
    shape: tuple[int, ...]
    """Shape of the built tensor."""
    build: Callable[[], Tensor]
    """Function that reads the tensor from disk or computes it from stored tensors."""

    @property
    def num_bytes(self) -> int:
        """Returns the size of the tensor's elements in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def cast(self, dtype: torch.dtype) -> "PlannedTensor":
        """Returns a plan that converts the tensor to another floating-point dtype; integer tensors stay unchanged.

        The plan's `build` raises a ConfigError if a value is too large for the dtype.
        """
        if not self.dtype.is_floating_point:
            return self
        return self._replace(dtype=dtype, build=lambda: _cast(self.name, self.build(), dtype))


def plan_copy(reader: WeightReader, name: str) -> PlannedTensor:
    """Plans to write a stored tensor unchanged, under its own name."""
    return PlannedTensor(name, reader.dtype(name), tuple(reader.shape(name)), lambda: reader.read(name))


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    if tensor.numel():
        low, high = (float(x) for x in tensor.aminmax())
        if low < -limit or high > limit:
            raise ConfigError(
                f"{name} has values from {low:g} to {high:g}, but {dtype} has at most {limit:g}. Use another --dtype."
            )
    return tensor.to(dtype)
