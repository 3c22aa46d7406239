"""The tensors of a file to be written, each with the way to make it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.config import ConfigError
from beit3_ds.weights.source import TensorSource


class Recipe(NamedTuple):
    """A tensor that is made when its turn has come, so that only one exists at a time."""

    name: str
    """Its name in the file."""
    dtype: torch.dtype
    """The type that `make` gives."""
    shape: tuple[int, ...]
    """The shape that `make` gives."""
    make: Callable[[], Tensor]
    """Reads the tensor, or computes it from what it reads."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def cast(self, dtype: torch.dtype) -> "Recipe":
        """The same tensor in another floating type; integers stay what they are.

        Raises:
            ConfigError: when it is made, if a number is too large for the type.
        """
        if not self.dtype.is_floating_point:
            return self
        return self._replace(dtype=dtype, make=lambda: _cast(self.name, self.make(), dtype))


def copy_recipe(source: TensorSource, name: str) -> Recipe:
    """A tensor of a source under its own name."""
    return Recipe(name, source.dtype(name), tuple(source.shape(name)), lambda: source.read(name))


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    if tensor.numel():
        low, high = (float(x) for x in tensor.aminmax())
        if low < -limit or high > limit:
            raise ConfigError(
                f"{name} holds numbers from {low:g} to {high:g}, but {dtype} ends at {limit:g}. Export another --dtype."
            )
    return tensor.to(dtype)
