"""Tests that a failing monitor never ends a run, and that every monitor has all figures at the end."""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from beit3_ds.training.monitor import Event, RunMonitor
from tests.retrying.failing_disk import MOMENTS, failing_disk


def master(**parts: Any) -> SimpleNamespace:
    """Returns a stand-in for DeepSpeed's `MonitorMaster` with the given monitors."""
    names = ("csv_monitor", "tb_monitor", "wandb_monitor", "comet_monitor")
    return SimpleNamespace(enabled=bool(parts), **(dict.fromkeys(names) | parts))


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.floats(-1e6, 1e6, width=32), max_size=10), moments=MOMENTS)
def test_an_event_file_is_complete_whenever_its_disk_fails(values: list[float], moments: list[int | None]) -> None:
    """Catches event files that end at the first disk error, and torn records, after which readers stop.

    TensorBoard's own writer fails here, because its thread ends at the first error.
    """
    with TemporaryDirectory() as folder:
        part = SimpleNamespace(summary_writer=SummaryWriter(folder))
        monitor = RunMonitor(master(tb_monitor=part), lambda line: None)
        with failing_disk(moments):
            for step, value in enumerate(values):
                monitor.write_events([("train/loss", value, step)])
        assert monitor.retry()
        assert len(list(Path(folder).iterdir())) == 1
        events = EventAccumulator(folder).Reload()
        found = events.Scalars("train/loss") if values else []
        assert [(event.step, event.value) for event in found] == list(enumerate(values))


class FlakyService:
    """Fakes a service that takes one event per call and fails on chosen events."""

    def __init__(self, failures: list[bool]) -> None:
        self.taken: list[Event] = []
        self._failures = iter(failures)

    def write_events(self, events: list[Event]) -> None:
        if next(self._failures, False):
            raise ConnectionError("no\nnetwork")
        self.taken += events


@given(count=st.integers(0, 9), failures=st.lists(st.booleans(), max_size=20))
def test_a_service_that_fails_gets_every_event_once(count: int, failures: list[bool]) -> None:
    said: list[str] = []
    service = FlakyService(failures)
    monitor = RunMonitor(master(wandb_monitor=service, comet_monitor=FlakyService([])), said.append)
    events = [("train/loss", 0.5, step) for step in range(count)]
    for event in events:
        monitor.write_events([event, event])
    while not monitor.retry():
        pass
    assert service.taken == [event for event in events for _ in range(2)]
    assert [line.startswith("WARNING: wandb takes no figures: ConnectionError: no network.") for line in said] == [
        number % 2 == 0 for number in range(len(said))
    ]


def test_ranks_without_monitors(tmp_path: Path) -> None:
    monitor = RunMonitor(master(), lambda line: None)
    monitor.write_events([("train/loss", 0.5, 1)])
    monitor.forget_after(3)
    assert monitor.retry() and not monitor.enabled
