"""Makes all ranks stop after the same step if any rank has received a stop signal or has no data."""

from typing import Literal

import torch

from beit3_ds.parallel import Mesh
from beit3_ds.runtime.stop_signals import STOP_SIGNALS, StopSignals
from beit3_ds.storage_error import StorageError


class DistributedStopSignals:
    """Shares stop signals and data errors among all ranks. `synchronize` makes the attributes equal on all ranks."""

    def __init__(self, signals: StopSignals, mesh: Mesh) -> None:
        self._signals, self._mesh = signals, mesh
        self.names = ""
        """Names of the stop signals that any rank has received, joined by "and"; empty without a stop signal."""
        self.first: int | None = None
        """Signal number of a stop signal that any rank has received; None without a stop signal. If ranks have received
        several signals, this is the one that comes first in `STOP_SIGNALS`."""
        self.data_fault: Literal["data", "storage"] | None = None
        """Reason why a rank has no data: "storage" if a file system failed, otherwise "data". None if all ranks have
        data."""

    @property
    def must_stop(self) -> bool:
        """Returns whether the run must stop now, because a rank has received a stop signal or has no data."""
        return bool(self.names or self.data_fault)

    def synchronize(self, data_error: Exception | None = None) -> bool:
        """Exchanges stop signals and data errors among all ranks, and returns the new value of `must_stop`.

        All ranks must call this method. It all-reduces six integers in host memory.

        Args:
            data_error: error that left this rank without data; None if this rank has data.
        """
        faults = [data_error is not None, isinstance(data_error, StorageError)]
        own = [*(number in self._signals.received for number in STOP_SIGNALS), *faults]
        *received, failed, failed_storage = self._mesh.host.sum(torch.tensor(own, dtype=torch.int64)).tolist()
        numbers = [number for number, count in zip(STOP_SIGNALS, received, strict=True) if count]
        self.names, self.first = " and ".join(number.name for number in numbers), next(iter(numbers), None)
        self.data_fault = "storage" if failed_storage else "data" if failed else None
        self._signals.is_stop_agreed = bool(self.names)
        return self.must_stop
