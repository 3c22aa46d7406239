"""Copies the training state to host memory, and writes the copy to disk in a thread while training continues."""

import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3_ds.checkpoint.collection import CheckpointCollection
from beit3_ds.checkpoint.engine_state import EngineState
from beit3_ds.checkpoint.index import Index
from beit3_ds.checkpoint.pieces import PieceTable
from beit3_ds.checkpoint.rank_report import RankReport
from beit3_ds.checkpoint.run_description import RunDescription
from beit3_ds.checkpoint.snapshot import Snapshot
from beit3_ds.checkpoint.tensor_file import WrittenFile
from beit3_ds.parallel import HostGroup, Mesh
from beit3_ds.storage_error import StorageError

_NOTICE_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class SaveOutcome:
    """Result of a save.

    All ranks get the same step and path. They also get the same error, unless ranks lose contact during the save. Each
    rank measures the seconds for itself.
    """

    step: int
    """Number of training steps before the save."""
    path: Path
    """Folder of the checkpoint."""
    error: str | None
    """One-line error message; None if the checkpoint is complete on disk."""
    held_up_seconds: float
    """Seconds that training waited for the previous save and for the copy to host memory."""
    seconds: float
    """Seconds from the start of the save to its end."""


class BackgroundSave:
    """Copies the training state to host memory, and writes the copy to disk in a thread.

    The threads of all ranks communicate through a separate process group. A failed save is reported, and leaves earlier
    checkpoints unchanged.
    """

    def __init__(
        self,
        collection: CheckpointCollection,
        mesh: Mesh,
        host: HostGroup,
        run: RunDescription,
        timeout_seconds: float,
    ) -> None:
        """Stores the arguments; starts no thread.

        Args:
            collection: checkpoints of the run.
            mesh: the mesh of ranks.
            host: group in which all ranks exchange values in host memory; used only by the threads that save.
            run: description of this run, stored in every checkpoint.
            timeout_seconds: maximum seconds that `wait` waits.
        """
        self._collection, self._mesh, self._host, self._run = collection, mesh, host, run
        self._timeout_seconds = timeout_seconds
        self._snapshot: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._outcomes: list[SaveOutcome] = []

    def reserve_memory(self, state: EngineState) -> None:
        """Starts a thread that reserves host memory for copies of the state, so that the first save is faster."""
        self._snapshot = Snapshot(state)
        self._start_thread(self._snapshot.reserve_memory)

    def start(self, state: EngineState, step: int, data: Mapping[str, Any], begun: float) -> None:
        """Copies the state to host memory, and starts a thread that writes the copy to disk.

        All ranks must call `wait` before each call of `start`.

        Args:
            state: training state of this rank: weights and optimizer moments.
            step: number of training steps so far.
            data: position in the data and other state (`Index.data`); only the main rank's value is saved.
            begun: `time.monotonic()` at the start of the save.
        """
        snapshot = self._snapshot = self._snapshot or Snapshot(state)
        snapshot.reserve_memory()
        snapshot.copy_state()
        held_up = time.monotonic() - begun
        self._start_thread(lambda: self._write(snapshot, step, data, begun, held_up))

    def wait(self) -> None:
        """Waits until this rank's current save or reservation of memory has ended; returns immediately if there is
        none.

        Raises:
            StorageError: if the wait takes longer than `timeout_seconds`; earlier checkpoints stay unchanged.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._mesh.activity.begin("saving")
        rank, root, start = self._host.rank, self._collection.root, time.monotonic()
        while thread.is_alive() and (waited := time.monotonic() - start) < self._timeout_seconds:
            thread.join(min(_NOTICE_SECONDS, self._timeout_seconds - waited))
            if thread.is_alive():
                seconds = time.monotonic() - start
                print(f"rank {rank} has waited {seconds:.0f} s for a save in {root}", file=sys.stderr)
        if thread.is_alive():
            raise StorageError(
                f"rank {rank} (host {socket.gethostname()}) has waited {self._timeout_seconds:g} s for a save in "
                f"{root}: its file system does not answer, or is slower than parallel.timeout_seconds allows. "
                "Checkpoints that were saved before are untouched."
            )

    def take_outcomes(self) -> list[SaveOutcome]:
        """Returns the results of all saves that ended since the last call; does not wait for a running save."""
        taken, self._outcomes = self._outcomes, []
        return taken

    def _start_thread(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    # The code below runs in the writing thread, together with the writing threads of all ranks.

    def _write(self, snapshot: Snapshot, step: int, data: Mapping[str, Any], begun: float, held_up: float) -> None:
        try:
            error = self._write_together(snapshot, step, data)
        except RuntimeError as failure:
            # Another rank is gone. The training thread of this rank notices that too, and ends the run.
            error = f"lost contact with another rank while saving: {_one_line(failure)}"
        self._outcomes.append(
            SaveOutcome(
                step=step,
                path=self._collection.path(step),
                error=error,
                held_up_seconds=held_up,
                seconds=time.monotonic() - begun,
            )
        )

    def _write_together(self, snapshot: Snapshot, step: int, data: Mapping[str, Any]) -> str | None:
        """Writes and publishes the checkpoint together with all other ranks.

        Returns:
            An error message, equal on all ranks, if any rank failed; None if the save succeeded.
        """
        collection = self._collection
        error = self._from_main(
            self._attempt(lambda: collection.create_temporary(step)) if self._mesh.is_main else None
        )
        if error:
            return error
        written: dict[str, WrittenFile] = {}
        error = self._attempt(lambda: written.update(self._write_files(snapshot, collection.temporary_path(step))))
        rank = self._host.rank
        report = RankReport(error, written, snapshot.shapes(), snapshot.pieces(rank), snapshot.buffers(rank))
        collected = self._host.collect(report.to_plain())
        if collected is not None:
            reports = [RankReport.from_plain(*plain) for plain in collected]
            error = next((other.error for other in reports if other.error), None)
            error = error or self._attempt(lambda: self._publish(reports, step, snapshot.optimizer_step, data))
            if error:
                collection.discard_temporary(step)
        error = self._from_main(error)
        if not error:
            collection.mark_whole(collection.path(step))
        return error

    def _attempt(self, work: Callable[[], Any]) -> str | None:
        """Calls `work` and catches all errors. Returns None, or a one-line error message that names this rank."""
        try:
            work()
        except Exception as error:  # the other ranks wait for this rank's report
            return f"{_one_line(error)} (rank {self._host.rank}, {self._mesh.coords})"
        return None

    def _from_main(self, value: str | None) -> str | None:
        answer: str | None = self._host.broadcast(value)
        return answer

    def _write_files(self, snapshot: Snapshot, temporary: Path) -> dict[str, WrittenFile]:
        temporary.mkdir(exist_ok=True)  # a network file system may show it late
        return snapshot.write(temporary, self._host.rank)

    def _publish(
        self, reports: Sequence["RankReport"], step: int, optimizer_step: int, data: Mapping[str, Any]
    ) -> None:
        pieces = PieceTable.join([report.pieces for report in reports])
        index = Index(
            step=step,
            optimizer_step=optimizer_step,
            run=self._run,
            shapes={name: shape for report in reports for name, shape in report.shapes.items()},
            num_pieces=pieces.counts,
            files={name: file for report in reports for name, file in report.files.items()},
            buffers={name: buffer for report in reports for name, buffer in report.buffers.items()},
            data=data,
        )
        self._collection.publish(index, pieces)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
