"""Iterates over the batches of a split on all ranks together."""

from collections.abc import Callable, Iterable, Iterator

import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ConfigError
from beit3_ds.data import EvaluationBatches, WaitLimits
from beit3_ds.data.workers.waiting import StopRequestedError
from beit3_ds.parallel import BroadcastBatches, Mesh
from beit3_ds.storage_error import StorageError


class SplitBatches:
    """Iterates over this rank's batches of a split, in step with all other ranks.

    Ranks that do not read data receive their batches from ranks that do. Before each batch, all ranks exchange three
    integers to check that every rank has a batch. An error or a stop signal on one rank therefore ends the iteration on
    all ranks, and no rank waits in a collective forever.
    """

    def __init__(self, own: EvaluationBatches | None, mesh: Mesh, limits: WaitLimits) -> None:
        """Stores the arguments. Reading begins with the iteration.

        Args:
            own: batches that this rank reads; None on ranks that receive their batches.
            mesh: mesh of all ranks.
            limits: limits of the wait for a batch: a maximum time and a stop signal.
        """
        self._own, self._mesh, self._limits = own, mesh, limits

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yields this rank's batches.

        Raises:
            ConfigError: on all ranks, if a rank cannot read a sample.
            StorageError: on all ranks, if a file system fails.
            StopRequestedError: on all ranks, if a rank received a stop signal.
        """
        read: Iterable[PackedBatch] = () if self._own is None else _Reading(self._own, self._limits)
        return iterate_together(BroadcastBatches(read, self._mesh, PackedBatch), self._mesh, self._limits.is_stopping)


class StoppableBatches:
    """Iterates over this rank's batches in step with the other ranks. An error or a stop signal on one rank stops all
    ranks.

    Before each batch, all ranks exchange three integers.
    """

    def __init__(self, batches: Iterable[PackedBatch], mesh: Mesh, is_stopping: Callable[[], bool]) -> None:
        """Stores the arguments.

        Args:
            batches: this rank's batches; all ranks must have the same number.
            mesh: mesh of all ranks.
            is_stopping: function that returns whether this rank has received a stop signal.
        """
        self._batches, self._mesh, self._is_stopping = batches, mesh, is_stopping

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yields the batches. An error or a stop signal on one rank is raised on all ranks (`iterate_together`)."""
        return iterate_together(self._batches, self._mesh, self._is_stopping)


class _Reading:
    def __init__(self, own: EvaluationBatches, limits: WaitLimits) -> None:
        self._own, self._limits = own, limits

    def __iter__(self) -> Iterator[PackedBatch]:
        try:
            yield from self._own.read(self._limits)
        except StopRequestedError:
            return  # `iterate_together` ends the evaluation because of the signal


def iterate_together(
    batches: Iterable[PackedBatch], mesh: Mesh, is_stopping: Callable[[], bool]
) -> Iterator[PackedBatch]:
    """Yields this rank's batches. An error or a stop signal on one rank ends the iteration on all ranks.

    All ranks must call this function, and must have the same number of batches.

    Args:
        batches: this rank's batches.
        mesh: mesh of all ranks.
        is_stopping: function that returns whether this rank has received a stop signal.

    Raises:
        ConfigError, StorageError: on all ranks, if a rank raises one of them while reading a batch.
        StopRequestedError: on all ranks, if a rank received a stop signal.
    """
    iterator = iter(batches)
    while True:
        mesh.activity.begin("reading evaluation data")
        batch, error = None, None
        try:
            batch = next(iterator, None)
        except (ConfigError, StorageError) as raised:
            error = raised
        own = torch.tensor([error is not None, is_stopping(), batch is None], dtype=torch.int64)
        failed, stopping, ended = mesh.host.sum(own).tolist()
        if failed:
            found = [line for line in mesh.host.gather(_describe(error)) if line]
            raise StorageError(found[0][1]) if found[0][0] == "storage" else ConfigError(found[0][1])
        if stopping:
            raise StopRequestedError
        if ended:
            assert ended == mesh.num_ranks, f"{mesh.num_ranks - ended} ranks have batches left"
            return
        assert batch is not None
        yield batch


def _describe(error: Exception | None) -> list[str]:
    if error is None:
        return []
    return ["storage" if isinstance(error, StorageError) else "data", str(error)]
