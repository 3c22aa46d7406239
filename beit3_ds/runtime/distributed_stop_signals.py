"""Stops all ranks after the same step if any of them has received a stop signal or has no data."""

from typing import Literal

import torch

from beit3_ds.parallel import Mesh
from beit3_ds.runtime.stop_signals import STOP_SIGNALS, StopSignals
from beit3_ds.storage_error import StorageError


class DistributedStopSignals:
    """Shares stop signals and data errors among all ranks: `synchronize` makes the fields equal on all of them."""

    def __init__(self, signals: StopSignals, mesh: Mesh) -> None:
        self._signals, self._mesh = signals, mesh
        self.names = ""
        """Names of the stop signals that any rank has received, joined by "and"; empty if no rank has received one."""
        self.first: int | None = None
        """Number of a stop signal that a rank has received; of several, the first in `STOP_SIGNALS`. None if none."""
        self.data_fault: Literal["data", "storage"] | None = None
        """Why a rank has no data: "storage" for a failed file system, else "data". None if all ranks have data."""

    @property
    def must_stop(self) -> bool:
        """Returns True if the run must stop now, because a rank has received a stop signal or has no data."""
        return bool(self.names or self.data_fault)

    def synchronize(self, data_error: Exception | None = None) -> bool:
        """Exchanges signals and errors with all ranks, which all call it, and returns the new `must_stop`.

        Sends six integers.

        Args:
            data_error: error that left this rank without data; None if it has data.
        """
        faults = [data_error is not None, isinstance(data_error, StorageError)]
        own = [*(number in self._signals.received for number in STOP_SIGNALS), *faults]
        *received, failed, failed_storage = self._mesh.host.sum(torch.tensor(own, dtype=torch.int64)).tolist()
        numbers = [number for number, count in zip(STOP_SIGNALS, received, strict=True) if count]
        self.names, self.first = " and ".join(number.name for number in numbers), next(iter(numbers), None)
        self.data_fault = "storage" if failed_storage else "data" if failed else None
        self._signals.is_stop_agreed = bool(self.names)
        return self.must_stop
