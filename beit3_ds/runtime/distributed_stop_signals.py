"""Lets all ranks stop after the same step, when any of them has received a stop signal or has no data."""

from typing import Literal

import torch

from beit3_ds.parallel import Mesh
from beit3_ds.runtime.stop_signals import STOP_SIGNALS, StopSignals
from beit3_ds.storage_error import StorageError


class DistributedStopSignals:
    """Collects the stop signals and data errors of all ranks, equal on all ranks after each `synchronize`."""

    def __init__(self, signals: StopSignals, mesh: Mesh) -> None:
        self._signals, self._mesh = signals, mesh
        self.names = ""
        """Names of the stop signals that any rank had received, joined by "and"; empty without."""
        self.data_fault: Literal["data", "storage"] | None = None
        """Why any rank had no data: "data" for its files or workers, "storage" for a file system that fails."""

    @property
    def must_stop(self) -> bool:
        """Returns whether the run must stop after the finished step, for a stop signal or for missing data."""
        return bool(self.names or self.data_fault)

    def synchronize(self, data_error: Exception | None = None) -> bool:
        """Returns `must_stop`, updated on all ranks, which call it together; sends five integers.

        Args:
            data_error: error because of which this rank has no data; None if it has data.
        """
        faults = [data_error is not None, isinstance(data_error, StorageError)]
        own = [*(number in self._signals.received for number in STOP_SIGNALS), *faults]
        *received, failed, failed_storage = self._mesh.host.sum(torch.tensor(own, dtype=torch.int64)).tolist()
        self.names = " and ".join(number.name for number, count in zip(STOP_SIGNALS, received, strict=True) if count)
        self.data_fault = "storage" if failed_storage else "data" if failed else None
        self._signals.is_stop_agreed = bool(self.names)
        return self.must_stop
