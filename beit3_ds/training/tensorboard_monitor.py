"""Writes the event file of DeepSpeed's TensorBoard monitor, and completes it once a failed disk works again.

TensorBoard's own writer ends its thread at the first error; each later figure then raises that error.
"""

import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from beit3_ds.retrying.file import RetryingFile


class TensorBoardMonitor:
    """Appends figures (named numbers such as losses) to an event file."""

    def __init__(self, summary_writer: Any, report: Callable[[str], None]) -> None:
        """Closes DeepSpeed's writer, which has begun the file, and continues the file.

        Args:
            summary_writer: `torch.utils.tensorboard.SummaryWriter`.
            report: receives a line when the file cannot be written, and when it is complete again.
        """
        summary_writer.flush()
        path = Path(summary_writer.file_writer.event_writer._file_name)
        summary_writer.close()
        self._file = RetryingFile(path, report, has_lines=False)

    def write_events(self, events: Sequence[tuple[str, Any, int]]) -> None:
        """Appends each event (name, value, step)."""
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
        from torch.utils.tensorboard.summary import scalar

        content = io.BytesIO()
        records = RecordWriter(content)
        for name, value, step in events:
            event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
            records.write(event.SerializeToString())
        self._file.append(content.getvalue())

    def retry(self) -> bool:
        """Writes the events that are missing; returns whether the file is complete."""
        return self._file.retry()
