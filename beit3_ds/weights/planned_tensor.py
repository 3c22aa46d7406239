"""Plans the tensors of a file; their elements are read or computed only when they are written."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.checkpoint.slices import whole_slice
from beit3_ds.config import ConfigError
from beit3_ds.weights.reader import WeightReader

_BLOCK_ELEMENTS = 1 << 18
"""Maximum number of elements that a copy reads at once: 1 MiB of float32.

Each block reuses the memory of the previous block, which is still in the processor's cache. With new memory for each
whole tensor, copying was several times slower.
"""


class PlannedTensor(NamedTuple):
    """A tensor to write, whose elements are built in blocks while it is written; memory holds one block at a time."""

    name: str
    """Name of the tensor in the file."""
    dtype: torch.dtype
    """Dtype of every block."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    blocks: Callable[[], Iterable[Tensor]]
    """Function that reads or computes the tensor's elements in row-major order, in blocks of any shape."""

    @property
    def num_bytes(self) -> int:
        """Returns the size of the tensor's elements in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def cast(self, dtype: torch.dtype) -> "PlannedTensor":
        """Returns a plan that converts the tensor to another floating-point dtype; integer tensors stay unchanged.

        The plan's `blocks` raise a ConfigError if a value is too large for the dtype.
        """
        if not self.dtype.is_floating_point:
            return self
        return self._replace(dtype=dtype, blocks=lambda: (_cast(self.name, x, dtype) for x in self.blocks()))


def plan_copy(reader: WeightReader, name: str) -> PlannedTensor:
    """Plans to write a stored tensor unchanged, under its own name."""
    return PlannedTensor(name, reader.dtype(name), tuple(reader.shape(name)), lambda: read_blocks(reader, name))


def read_blocks(reader: WeightReader, name: str) -> Iterator[Tensor]:
    """Yields a stored tensor's elements in row-major order, in blocks that fit into a processor's cache."""
    for part in whole_slice(reader.shape(name)).blocks(_BLOCK_ELEMENTS):
        yield reader.read(name, part)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    if tensor.numel():
        low, high = (float(x) for x in tensor.aminmax())
        if low < -limit or high > limit:
            raise ConfigError(
                f"{name} has values from {low:g} to {high:g}, but {dtype} has at most {limit:g}. Use another --dtype."
            )
    return tensor.to(dtype)
