"""Sends the logged values of a run, such as losses, to DeepSpeed's monitors. No monitor can end the run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from beit3_ds.training.csv_monitor import CsvMonitor
from beit3_ds.training.tensorboard_monitor import TensorBoardMonitor

Event = tuple[str, Any, int]
"""A logged value as (name, value, step), such as ("train/loss", 2.5, 100)."""


class _Part(Protocol):
    def write_events(self, events: Sequence[Event]) -> None: ...

    def retry(self) -> bool: ...


class RunMonitor:
    """Replaces `engine.monitor`, to which this program and DeepSpeed's engine send logged values such as losses.

    Passes the values to the enabled writers: CSV files, TensorBoard, wandb and Comet. If a writer does not accept
    values, they are kept for this writer, and sent with later values or by `retry`.
    """

    def __init__(self, master: Any, report: Callable[[str], None]) -> None:
        """Takes over the monitors that DeepSpeed has built.

        Args:
            master: DeepSpeed's `MonitorMaster`, which has monitors only on the main rank.
            report: function that receives one line when a monitor fails, and one when it works again.
        """
        self.enabled = bool(master.enabled)
        self._csv: CsvMonitor | None = None
        self._parts: list[_Part] = []
        if master.csv_monitor is not None:
            self._csv = CsvMonitor(Path(master.csv_monitor.log_dir), report)
            self._parts.append(self._csv)
        if master.tb_monitor is not None:
            self._parts.append(TensorBoardMonitor(master.tb_monitor.summary_writer, report))
        for name, service in (("wandb", master.wandb_monitor), ("comet", master.comet_monitor)):
            if service is not None:
                self._parts.append(_Service(name, service, report))

    def write_events(self, events: Sequence[Event]) -> None:
        """Sends logged values to all monitors. Raises no error if a monitor fails."""
        for part in self._parts:
            part.write_events(events)

    def forget_after(self, step: int) -> None:
        """Deletes the values of steps after `step` from CSV files (`CsvMonitor.forget_after`)."""
        if self._csv is not None:
            self._csv.forget_after(step)

    def retry(self) -> bool:
        """Sends the values that monitors lack, and returns whether all monitors have all values."""
        return sum(not part.retry() for part in self._parts) == 0  # `all` would stop at the first failure


class _Service:
    """Sends logged values to an online service (wandb or comet), one by one and in order."""

    def __init__(self, name: str, service: Any, report: Callable[[str], None]) -> None:
        self._name, self._service, self._report = name, service, report
        self._missing: list[Event] = []
        self._has_failed = False

    def write_events(self, events: Sequence[Event]) -> None:
        self._missing += events
        self.retry()

    def retry(self) -> bool:
        try:
            while self._missing:
                self._service.write_events(self._missing[:1])
                del self._missing[0]
        except Exception as error:  # each library has its own errors
            if not self._has_failed:
                why = " ".join(str(error).split())
                self._report(
                    f"WARNING: {self._name} takes no figures: {type(error).__name__}: {why}. The run continues and "
                    "sends them once that is possible."
                )
            self._has_failed = True
            return False
        if self._has_failed:
            self._report(f"{self._name} has all figures again")
        self._has_failed = False
        return True
