"""Writes the event file of DeepSpeed's TensorBoard monitor, and completes it once a failed disk works again.

TensorBoard's own writer stops at the first error, and raises that error again for each value logged later.
"""

import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from beit3_ds.retrying.file import RetryingFile


class TensorBoardMonitor:
    """Appends logged values, such as losses, to a TensorBoard event file."""

    def __init__(self, summary_writer: Any, report: Callable[[str], None]) -> None:
        """Closes DeepSpeed's writer, and continues the event file of that writer.

        Args:
            summary_writer: DeepSpeed's writer, a `torch.utils.tensorboard.SummaryWriter`.
            report: function that receives one line when the file cannot be written, and one when missed events have
                been written.
        """
        summary_writer.flush()
        path = Path(summary_writer.file_writer.event_writer._file_name)
        summary_writer.close()
        self._file = RetryingFile(path, report, has_lines=False)

    def write_events(self, events: Sequence[tuple[str, Any, int]]) -> None:
        """Appends one scalar per event (name, value, step)."""
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
        """Writes events that could not be written before, and returns whether the file is complete."""
        return self._file.retry()
