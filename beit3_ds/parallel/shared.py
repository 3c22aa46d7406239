"""Items that few ranks of one copy of the model read and all its ranks use."""

from collections.abc import Iterable, Iterator
from typing import Any, Generic, Protocol, Self, TypeVar

from beit3_ds.config import ConfigError
from beit3_ds.parallel.mesh import Mesh


class Shareable(Protocol):
    """An item of which most ranks need only a part."""

    def abridged(self) -> Self:
        """What ranks need that neither embed nor predict."""

    def fingerprint(self) -> str:
        """Equal for items that two ranks read from the same samples."""


ItemT = TypeVar("ItemT", bound=Shareable)


class Shared(Generic[ItemT]):
    """Iterates over the items that the reading ranks (`Mesh.is_reader`) bring, on all ranks of a copy of the model.

    So one tensor-parallel rank of the first and of the last stage decodes images, each the view that its stage needs.
    The first stage sends its abridged items to the others; the last compares them with its own. Each item is sent,
    pickled, when it is asked for; all ranks must ask for as many. An error in the user's data is raised on all of them.
    """

    def __init__(self, items: Iterable[ItemT], mesh: Mesh) -> None:
        """Reads nothing yet.

        Args:
            items: read on the reading ranks only, anew for every iteration.
            mesh: the ranks that share them.
        """
        self._items, self._mesh = items, mesh

    def __iter__(self) -> Iterator[ItemT]:
        """Yields this stage's items; sends each abridged to the other stages, and whole to tensor-parallel peers."""
        if self._mesh.model_parallel_size == 1:
            yield from self._items
            return
        iterator = iter(self._items) if self._mesh.is_reader else iter(())
        while True:
            item = self._share(_next(iterator))
            if isinstance(item, ConfigError):
                raise item
            if item is None:
                return
            yield item

    def _share(self, own: Any) -> Any:
        mesh = self._mesh
        if mesh.tensor.rank == 0 and mesh.pipeline.size > 1:
            own = self._share_with_stages(own)
        return mesh.tensor.broadcast_object(own)

    def _share_with_stages(self, own: Any) -> Any:
        pipeline = self._mesh.pipeline
        abridged, fingerprint = None, None
        if own is not None and not isinstance(own, ConfigError):
            fingerprint = own.fingerprint()
            abridged = own.abridged() if pipeline.is_first else None
        brought = pipeline.all_gather_object(own if isinstance(own, ConfigError) else (abridged, fingerprint))
        for value in brought:
            if isinstance(value, ConfigError):
                return value
        if brought[0][1] != brought[-1][1]:
            return ConfigError(
                "data: the first and the last stage of the pipeline read different samples: a record that one could "
                "read the other could not, or they see different files. Check that every node sees the same data. "
                f"First: {brought[0][1]}; last: {brought[-1][1]}."
            )
        return own if self._mesh.is_reader else brought[0][0]


def _next(iterator: Iterator[ItemT]) -> ItemT | ConfigError | None:
    try:
        return next(iterator, None)
    except ConfigError as error:
        return error
