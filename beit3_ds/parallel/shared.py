"""Items that one rank of a tensor-parallel group reads and all its ranks use."""

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from beit3_ds.config import ConfigError
from beit3_ds.parallel.tensor import TensorParallel

ItemT = TypeVar("ItemT")


class Shared(Generic[ItemT]):
    """Iterates over the items of the group's first rank on all its ranks.

    So only one rank of a group decodes images. Each item is sent whole, pickled, when it is asked for; all ranks must
    ask for as many. An error in the user's data is raised on all of them.
    """

    def __init__(self, items: Iterable[ItemT], tensor: TensorParallel) -> None:
        """Reads nothing yet.

        Args:
            items: read on the first rank only, anew for every iteration.
            tensor: the ranks that share them.
        """
        self._items, self._tensor = items, tensor

    def __iter__(self) -> Iterator[ItemT]:
        """Yields the first rank's items; each sends its size and its bytes to the other ranks."""
        if self._tensor.size == 1:
            yield from self._items
            return
        iterator = iter(self._items) if self._tensor.rank == 0 else iter(())
        while True:
            item = self._tensor.broadcast_object(_next(iterator))
            if isinstance(item, ConfigError):
                raise item
            if item is None:
                return
            yield item


def _next(iterator: Iterator[ItemT]) -> ItemT | ConfigError | None:
    try:
        return next(iterator, None)
    except ConfigError as error:
        return error
