"""Broadcasts batches from the ranks that read data to all ranks of a model copy."""

from collections.abc import Iterable, Iterator
from typing import Any, Generic, Protocol, Self, TypeVar

from beit3_ds.config import ConfigError
from beit3_ds.parallel.mesh import Mesh
from beit3_ds.storage_error import StorageError


class Shareable(Protocol):
    """Declares the interface of items, such as batches, that ranks send to each other."""

    def without_pixels(self) -> Self:
        """Returns the item without pixels and targets, for pipeline stages that hold neither the embeddings nor the
        head.
        """

    def fingerprint(self) -> str:
        """Returns a digest that identifies the samples, equal on all ranks that read the same samples."""

    def as_value(self) -> Any:
        """Converts the item to a value that `HostGroup` can send."""

    @classmethod
    def from_value(cls, value: Any) -> Self:
        """Rebuilds an item from the value that `as_value` returned."""


DataError = ConfigError | StorageError
"""Errors in reading data. If one rank raises such an error, the error is raised on all ranks of the same model copy."""

ItemT = TypeVar("ItemT", bound=Shareable)


class BroadcastBatches(Generic[ItemT]):
    """Yields items on all ranks of a model copy, although only some ranks read data (`Mesh.is_reader`).

    Two ranks read the same samples, and compare digests of the samples: tensor-parallel rank 0 of the first stage, and
    that of the last stage. The first stage sends its items, without pixels and targets, to the stages in between.
    Tensor-parallel rank 0 of each stage sends the stage's items to the other tensor-parallel ranks.

    All ranks must request the same number of items. An error in reading data on one rank is raised on all ranks of the
    model copy.
    """

    def __init__(self, items: Iterable[ItemT], mesh: Mesh, item_type: type[ItemT]) -> None:
        """Stores the arguments. Reading begins when the first item is requested.

        Args:
            items: items to read; only reading ranks iterate over them.
            mesh: mesh that contains this rank's model copy.
            item_type: type of the items.
        """
        self._items, self._mesh, self._type = items, mesh, item_type

    def __iter__(self) -> Iterator[ItemT]:
        """Yields this stage's items: whole items on the first and last stage, and items without pixels and targets on
        other stages.
        """
        if self._mesh.model_parallel_size == 1:
            yield from self._items
            return
        iterator = iter(self._items) if self._mesh.is_reader else iter(())
        while True:
            item = self._broadcast(_next(iterator))
            if isinstance(item, DataError):
                raise item
            if item is None:
                return
            yield item

    def _broadcast(self, own: ItemT | DataError | None) -> ItemT | DataError | None:
        mesh = self._mesh
        if mesh.tensor.rank == 0 and mesh.pipeline.size > 1:
            own = self._broadcast_to_stages(own)
        shared = self._unpack(mesh.tensor.host.broadcast(_pack(own) if mesh.tensor.rank == 0 else None))
        return own if mesh.tensor.rank == 0 else shared

    def _broadcast_to_stages(self, own: ItemT | DataError | None) -> ItemT | DataError | None:
        pipeline, is_reader = self._mesh.pipeline, self._mesh.is_reader
        if isinstance(own, DataError):
            gathered = pipeline.host.gather(_pack(own))
        else:
            gathered = pipeline.host.gather({"fingerprint": None if own is None else own.fingerprint()})
        for found in gathered:
            if "error" in found:
                return _unpack_error(found)
        first, last = gathered[0]["fingerprint"], gathered[-1]["fingerprint"]
        if first is None or last is None:
            return None  # a reading rank received a stop signal while it waited
        if first != last:
            return ConfigError(
                "data: the first and the last stage of the pipeline read different samples: a record that one could "
                "read the other could not, or they see different files. Check that every node sees the same data. "
                f"First: {first}; last: {last}."
            )
        assert not isinstance(own, DataError)
        without_pixels = own.without_pixels() if own is not None and pipeline.is_first else None
        shared = self._unpack(pipeline.host.broadcast(_pack(without_pixels)))
        return own if is_reader else shared

    def _unpack(self, value: Any) -> ItemT | DataError | None:
        if value is None:
            return None
        return _unpack_error(value) if "error" in value else self._type.from_value(value["item"])


def _pack(item: Shareable | DataError | None) -> Any:
    if item is None:
        return None
    if isinstance(item, DataError):
        return {"error": str(item), "is_storage": isinstance(item, StorageError)}
    return {"item": item.as_value()}


def _unpack_error(value: Any) -> DataError:
    return StorageError(value["error"]) if value["is_storage"] else ConfigError(value["error"])


def _next(iterator: Iterator[ItemT]) -> ItemT | DataError | None:
    try:
        return next(iterator, None)
    except (ConfigError, StorageError) as error:
        return error
