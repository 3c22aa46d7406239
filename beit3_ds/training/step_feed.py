"""Fetches a rank's data for the next step, and keeps errors until all ranks know of them.

All ranks can then save and stop together.
"""

import time
from collections.abc import Callable, Iterable, Iterator

from beit3_ds.batch import PackedBatch, StepBatch
from beit3_ds.config import ConfigError
from beit3_ds.parallel.activity import Activity
from beit3_ds.storage_error import StorageError


class StepFeed:
    """Fetches the data of steps, and keeps errors until all ranks know of them.

    Attributes:
        error: error that left this rank without data; None if there is none.
    """

    def __init__(self, steps: Iterable[StepBatch], activity: Activity, first_step: int) -> None:
        """Stores the arguments. Reads no data.

        Args:
            steps: this rank's steps, from `first_step` on.
            activity: record of this rank's current phase; `fetch` updates the record.
            first_step: index of the first step in `steps`; the first step of a run has index 0.
        """
        self._steps: Iterator[StepBatch] = iter(steps)
        self._activity, self._next_step = activity, first_step
        self._fetched: tuple[StepBatch, float] | None = None
        self.error: ConfigError | StorageError | None = None

    @property
    def upcoming(self) -> tuple[PackedBatch, ...]:
        """Returns the micro-batches of the fetched step; empty after an error or a stop signal."""
        return () if self._fetched is None else self._fetched[0].micro_batches

    @property
    def upcoming_seconds(self) -> float:
        """Returns the seconds that it took to fetch the next step, or 0 if the next step has not been fetched."""
        return 0.0 if self._fetched is None else self._fetched[1]

    def fetch(self) -> None:
        """Waits for the data of the next step and keeps it for `take`. An error is stored in `error`."""
        start = time.perf_counter()
        self._next_step += 1
        self._activity.begin("reading data", self._next_step)
        self.attempt(lambda: self._fetch(start))

    def take(self) -> tuple[StepBatch, float]:
        """Returns the fetched step, and the seconds that `fetch` waited for it."""
        assert self._fetched is not None, "fetch first"
        fetched, self._fetched = self._fetched, None
        return fetched

    def attempt(self, read: Callable[[], None]) -> None:
        """Calls `read`, a function that reads data, and stores an error in `error`."""
        try:
            read()
        except (ConfigError, StorageError) as error:
            self.error = error

    def raise_error(self, is_storage: bool) -> None:
        """Raises this rank's error. If this rank has none, raises an error that refers to the message of another rank.

        Call this method after all ranks have agreed to end.

        Args:
            is_storage: whether a file system failed on any rank. Not used if this rank has an error.

        Raises:
            StorageError: if this rank's error is a StorageError, or if this rank has no error and `is_storage` is true.
            ConfigError: in all other cases.
        """
        if self.error is not None:
            raise self.error
        kind = StorageError if is_storage else ConfigError
        raise kind("another rank could not get its data; its own line says why. The run ends.")

    def _fetch(self, start: float) -> None:
        step_batch = next(self._steps, None)
        if step_batch is not None:
            self._fetched = (step_batch, time.perf_counter() - start)
