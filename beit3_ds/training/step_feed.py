"""Fetches a rank's data between updates, at a point where all ranks can still agree to save and stop."""

import time
from collections.abc import Callable, Iterable, Iterator

from beit3_ds.batch import PackedBatch, StepBatch
from beit3_ds.config import ConfigError
from beit3_ds.parallel.activity import Activity
from beit3_ds.storage_error import StorageError


class StepFeed:
    """Fetches steps and keeps any error until all ranks agree on it (`DistributedStopSignals.synchronize`).

    Attributes:
        error: reason why this rank has no data; None if it has data.
    """

    def __init__(self, steps: Iterable[StepBatch], activity: Activity, first_step: int) -> None:
        """Prepares to fetch; reads nothing.

        Args:
            steps: this rank's steps, from `first_step` on.
            activity: receives the current activity of this rank.
            first_step: number of updates already done.
        """
        self._steps: Iterator[StepBatch] = iter(steps)
        self._activity, self._next_step = activity, first_step
        self._fetched: tuple[StepBatch, float] | None = None
        self.error: ConfigError | StorageError | None = None

    @property
    def has_step(self) -> bool:
        """Returns whether a step is ready; False after an error or a stop signal."""
        return self._fetched is not None

    @property
    def upcoming(self) -> tuple[PackedBatch, ...]:
        """Returns the micro-batches of the fetched step; empty after an error or a stop signal."""
        return () if self._fetched is None else self._fetched[0].micro_batches

    @property
    def upcoming_seconds(self) -> float:
        """Returns the seconds that the last `fetch` waited, if its step was not taken yet; otherwise 0."""
        return 0.0 if self._fetched is None else self._fetched[1]

    def fetch(self) -> None:
        """Waits for the data of the next step and keeps them for `take`, or keeps the error in `error`."""
        start = time.perf_counter()
        self._next_step += 1
        self._activity.begin("reading data", self._next_step)
        self.attempt(lambda: self._fetch(start))

    def take(self) -> tuple[StepBatch, float]:
        """Returns the fetched step, and the seconds that `fetch` waited."""
        assert self._fetched is not None, "fetch first"
        fetched, self._fetched = self._fetched, None
        return fetched

    def attempt(self, read: Callable[[], None]) -> None:
        """Calls `read`, which reads data, and keeps its error in `error` for `raise_error`."""
        try:
            read()
        except (ConfigError, StorageError) as error:
            self.error = error

    def raise_error(self, is_storage: bool) -> None:
        """Raises this rank's error, or an error that refers to another rank; call it after all ranks agreed to end.

        Args:
            is_storage: True if a file system failed on the rank without data.

        Raises:
            ConfigError: if a rank has no data for another reason than its file system.
            StorageError: if a file system failed.
        """
        if self.error is not None:
            raise self.error
        kind = StorageError if is_storage else ConfigError
        raise kind("another rank could not get its data; its own line says why. The run ends.")

    def _fetch(self, start: float) -> None:
        step_batch = next(self._steps, None)
        if step_batch is not None:
            self._fetched = (step_batch, time.perf_counter() - start)
