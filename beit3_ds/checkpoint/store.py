"""The checkpoints of a run: whole or absent, written beside training, loaded by any layout of ranks."""

import contextlib
import itertools
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from beit3_ds.checkpoint.disk import NewFile, rename, sync_folder, write_whole
from beit3_ds.checkpoint.engine_state import EngineState
from beit3_ds.checkpoint.folder import (
    CheckpointFolder,
    check_files,
    checkpoint_name,
    checkpoint_paths,
    is_own_checkpoint,
    left_over_paths,
)
from beit3_ds.checkpoint.index import INDEX_NAME, BrokenIndexError, Index, Piece, check_cover
from beit3_ds.checkpoint.rectangles import Rectangle
from beit3_ds.checkpoint.run_description import RunDescription
from beit3_ds.checkpoint.snapshot import Snapshot
from beit3_ds.checkpoint.tensor_file import BrokenTensorFileError, WrittenFile
from beit3_ds.config import ConfigError
from beit3_ds.parallel import Mesh, build_host_group
from beit3_ds.storage_error import StorageError

_LATEST = "latest"
_LONG_CHECK_BYTES = 1 << 30
_NOTICE_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class SaveOutcome:
    """How a save ended: the same on all ranks, but for the seconds, which are this rank's."""

    step: int
    """Updates that the checkpoint holds."""
    path: Path
    """Its folder."""
    error: str | None
    """What went wrong, on one line; None if the checkpoint is whole and on the disk."""
    held_up_seconds: float
    """How long training waited: for the save before it to end, and for the copy to host memory."""
    seconds: float
    """From the beginning of the save to its end."""


class CheckpointStore:
    """The folder `OUTPUT_DIR/checkpoints`, with one subfolder `step-XXXXXXXX` a checkpoint and a file `latest`.

    A save copies the rank's share of the state to host memory and writes it in a thread. A checkpoint is written aside,
    synced to disk and renamed, so it is there whole or not at all; then `latest`, a file with its name, is renamed, and
    the oldest are deleted. A save that is due while the one before is being written waits for that one: how much work a
    failure can cost does not depend on the disk. A save that fails is reported and leaves everything saved before.

    Nothing random is saved, because batches, masks and stochastic depth follow from the seed and the step.
    """

    def __init__(self, root: Path, keep: int, mesh: Mesh, run: RunDescription, timeout_seconds: float) -> None:
        """Opens the folder, which the first save creates. All ranks call it: it builds a group for their threads.

        Args:
            root: the folder; all ranks must see the same one.
            keep: number of whole checkpoints that are kept.
            mesh: the ranks.
            run: description of this run, which checkpoints hold.
            timeout_seconds: longest wait of a rank's thread for the others' threads, and of training for a save.
        """
        self.root, self._keep, self._mesh, self._run = root, keep, mesh, run
        self._rank = dist.get_rank()
        self._timeout_seconds = timeout_seconds
        self._host = build_host_group(timedelta(seconds=timeout_seconds))  # the threads' own
        self._snapshot: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._outcomes: list[SaveOutcome] = []
        self._refused: set[Path] = set()
        """Checkpoints in which `newest` found damage, which may not show in the sizes of their files."""
        self._was_there = root.exists()

    def prepare(self, state: EngineState) -> None:
        """Begins to take the memory of snapshots, in a thread, so that the first save need not wait for it."""
        self._snapshot = Snapshot(state)
        self._thread = threading.Thread(target=self._snapshot.take_memory, name="checkpoint", daemon=True)
        self._thread.start()

    def save(self, state: EngineState, step: int, data: Mapping[str, Any] | None = None) -> None:
        """Begins to save the state after `step` updates. All ranks call it, between two steps.

        Args:
            state: weights and moments.
            step: number of updates done.
            data: state of the data after these updates (`Index.data`); only the main rank's state is saved.

        Raises:
            ConfigError: on all ranks, if the optimizer's weights are not the model's (`EngineState.find_mismatch`).
                Later saves would be wrong too, so the run has to end; earlier checkpoints stay.
        """
        start = time.monotonic()
        self._mesh.activity.begin("saving")
        self.finish()
        self._check_state(state, step)
        self._snapshot = self._snapshot or Snapshot(state)
        self._snapshot.take_memory()
        self._snapshot.take()
        held_up = time.monotonic() - start
        arguments = (self._snapshot, step, dict(data or {}), start, held_up)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def _check_state(self, state: EngineState, step: int) -> None:
        own = state.find_mismatch(step)
        faults = self._host.gather(own)
        if not any(faults):
            return
        rank, fault = next((rank, fault) for rank, fault in enumerate(faults) if fault)
        newest = self.newest_path()
        raise ConfigError(
            f"the checkpoint of step {step} is not written, because it would not hold the model's weights: on "
            f"{self._mesh.describe(rank)} {fault}. DeepSpeed keeps its flat buffers in another order than this program "
            "reads them, which its options can cause. Leave out those keys of zero_optimization, bf16 and data_types "
            f"that docs/tested_deepspeed_keys.md does not list as tested, then start the same command again: "
            + (f"it resumes from {newest}, which is untouched." if newest else "there is no checkpoint yet.")
        )

    def finish(self) -> None:
        """Waits for the end of the current save, if any.

        Raises:
            StorageError: after `timeout_seconds`; earlier checkpoints are untouched.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._mesh.activity.begin("saving")
        start = time.monotonic()
        while thread.is_alive() and (waited := time.monotonic() - start) < self._timeout_seconds:
            thread.join(min(_NOTICE_SECONDS, self._timeout_seconds - waited))
            if thread.is_alive():
                seconds = time.monotonic() - start
                print(f"rank {self._rank} has waited {seconds:.0f} s for a save in {self.root}", file=sys.stderr)
        if thread.is_alive():
            raise StorageError(
                f"rank {self._rank} (host {socket.gethostname()}) has waited {self._timeout_seconds:g} s for a save in "
                f"{self.root}: its file system does not answer, or is slower than parallel.timeout_seconds allows. "
                "Checkpoints that were saved before are untouched."
            )

    def take_outcomes(self) -> list[SaveOutcome]:
        """The saves that ended since the last call; this never waits."""
        taken, self._outcomes = self._outcomes, []
        return taken

    def newest_path(self) -> Path | None:
        """The newest checkpoint whose files are all there, without reading them; None also if the folder is lost."""
        try:
            return next(self._whole_paths(), None)
        except OSError:
            return None

    def newest(self) -> CheckpointFolder | None:
        """The newest whole checkpoint, or None. All ranks call it, and share the reading of all its files.

        Torn and changed ones are passed over, and named on the main rank.
        """
        for name in self._host.broadcast([path.name for path in checkpoint_paths(self.root)]):
            folder, fault = self._examine(self.root / name)
            first = next((found for found in self._host.gather(fault) if found), None)
            if first is None:
                return folder
            self._refused.add(self.root / name)
            if self._mesh.is_main:
                print(f"checkpoint {self.root / name} is not whole ({first}); trying the one before", flush=True)
        return None

    def load(self, state: EngineState, folder: CheckpointFolder) -> int:
        """Restores weights and moments from a checkpoint of any layout. All ranks call it.

        Returns:
            The number of updates that the checkpoint holds, which is the step to go on with.

        Raises:
            ConfigError: if it holds another model, or belongs to other tokenizers, or was not written by this program.
        """
        changes = self._run.check_continues(folder.index.run, str(folder.path))
        if changes and self._mesh.is_main:
            print("settings that differ from the checkpoint's:\n  " + "\n  ".join(changes), flush=True)
        for name, part in state.parts.items():
            found = folder.index.shapes.get(name)
            if found != part.shape:
                raise ConfigError(f"checkpoint {folder.path}: {name} has shape {found}, the model's is {part.shape}.")
        try:
            state.load(folder.read_kind, folder.index.optimizer_step)
        except (BrokenIndexError, BrokenTensorFileError) as error:
            raise ConfigError(
                f"checkpoint {folder.path} cannot be loaded, though its digests fit: {error}. Delete it, and the same "
                "command goes on from the one before."
            ) from None
        finally:
            folder.close()
        return folder.step

    def _examine(self, path: Path) -> tuple[CheckpointFolder | None, str | None]:
        """Opens a checkpoint and reads this rank's share of its files; returns it, or what is wrong."""
        try:
            folder = CheckpointFolder(path)
        except BrokenIndexError as error:
            return None, str(error)
        num_bytes = sum(written.num_bytes for written in folder.index.files.values())
        if self._mesh.is_main and num_bytes > _LONG_CHECK_BYTES:
            print(f"checking {path} ({num_bytes / 1e9:.1f} GB)", flush=True)
        if path.name != checkpoint_name(folder.step):
            return None, f"it holds step {folder.step}"
        return folder, folder.find_damage(folder.files()[self._rank :: self._mesh.num_ranks])

    def _whole_paths(self) -> Iterator[Path]:
        """Those whose files are all there, as far as this process knows."""
        return (path for path in checkpoint_paths(self.root) if path not in self._refused and _is_whole(path))

    def _write(self, snapshot: Snapshot, step: int, data: Mapping[str, Any], start: float, held_up: float) -> None:
        """In the thread: writes what the snapshot holds, with the threads of all ranks."""
        target = self.root / checkpoint_name(step)
        try:
            error = self._write_together(snapshot, step, data, target)
        except RuntimeError as failure:
            # Another rank is gone: its training thread meets that, too, and the run ends.
            error = f"lost contact with another rank while saving: {_one_line(failure)}"
        self._outcomes.append(
            SaveOutcome(
                step=step,
                path=target,
                error=error,
                held_up_seconds=held_up,
                seconds=time.monotonic() - start,
            )
        )

    def _write_together(self, snapshot: Snapshot, step: int, data: Mapping[str, Any], target: Path) -> str | None:
        """Returns what went wrong on any rank, or None once the checkpoint is whole."""
        aside = self.root / f".writing-{target.name}"
        error = self._from_main(self._attempt(self._make_folder, aside) if self._mesh.is_main else None)
        if error:
            return error
        written: dict[str, WrittenFile] = {}
        error = self._attempt(lambda: written.update(self._write_files(snapshot, aside)))
        share = _Share(error, written, snapshot.shapes(), snapshot.pieces(self._rank))
        collected = self._host.collect(share.to_json())
        if collected is not None:
            shares = [_Share.from_json(text) for text in collected]
            error = next((other.error for other in shares if other.error), None)
            index = partial(Index, step=step, optimizer_step=snapshot.optimizer_step, run=self._run, data=data)
            error = error or self._attempt(self._complete, aside, target, index, shares)
            if error:
                shutil.rmtree(aside, ignore_errors=True)
        error = self._from_main(error)
        if not error:
            self._refused.discard(target)
        return error

    def _attempt(self, work: Any, *arguments: Any) -> str | None:
        """Runs a part of a save; returns what went wrong."""
        try:
            work(*arguments)
        except Exception as error:  # the other ranks wait to hear of it
            return f"{_one_line(error)} (rank {self._rank}, {self._mesh.coords})"
        return None

    def _from_main(self, value: str | None) -> str | None:
        answer: str | None = self._host.broadcast(value)
        return answer

    def _make_folder(self, aside: Path) -> None:
        for left_over in left_over_paths(self.root):
            shutil.rmtree(left_over, ignore_errors=left_over != aside)  # only that one is in the way
        try:
            aside.mkdir()
        except FileExistsError:
            raise OSError(f"{aside} is in the way and holds files that this program did not write; move it") from None
        except FileNotFoundError:
            if self._was_there:
                print(f"WARNING: {self.root} is gone, with the checkpoints in it; it is made anew", flush=True)
            aside.mkdir(parents=True)
        self._was_there = True
        sync_folder(self.root.parent)

    def _write_files(self, snapshot: Snapshot, aside: Path) -> dict[str, WrittenFile]:
        aside.mkdir(exist_ok=True)  # a network file system may show it late
        return snapshot.write(aside, self._rank)

    def _complete(
        self, aside: Path, target: Path, build_index: Callable[..., Index], shares: Sequence["_Share"]
    ) -> None:
        """On the main rank: writes the index, and puts the checkpoint where it is found."""
        pieces: dict[str, list[Piece]] = {}
        for share in shares:
            for name, piece in share.pieces:
                pieces.setdefault(name, []).append(piece)
        index = build_index(
            shapes={name: shape for share in shares for name, shape in share.shapes.items()},
            pieces=pieces,
            files={name: file for share in shares for name, file in share.files.items()},
        )
        check_cover(index.shapes, index.pieces)
        with NewFile(aside / INDEX_NAME) as file:
            file.write(index.to_json())
        sync_folder(aside)
        try:
            check_files(aside, index)
        except BrokenIndexError as error:
            raise OSError(f"{error} on the main rank: is {self.root} on a file system that all ranks share?") from None
        if os.path.lexists(target):
            self._clear(target)
        rename(aside, target)
        self._refused.discard(target)  # before pruning counts
        self._write_latest(target.name)
        with contextlib.suppress(OSError):  # the new one is safe; what could not be deleted now is deleted next time
            self._prune()

    def _clear(self, target: Path) -> None:
        """Frees the path of a checkpoint: deletes an own checkpoint of that step, and renames anything else."""
        if is_own_checkpoint(target):
            self._delete(target)
            return
        names = itertools.chain(
            [f"{target.name}.replaced"], (f"{target.name}.replaced-{i}" for i in itertools.count(2))
        )
        moved = next(path for name in names if not os.path.lexists(path := self.root / name))
        rename(target, moved)
        print(f"WARNING: {target} was no whole checkpoint of this program; it is now {moved}", flush=True)

    def _write_latest(self, name: str) -> None:
        latest = self.root / _LATEST
        if latest.is_symlink() or (latest.exists() and not latest.is_file()):
            print(f"WARNING: {latest} is not a file of this program and is left as it is", flush=True)
            return
        write_whole(latest, f"{name}\n".encode())

    def _prune(self) -> None:
        """Deletes this program's checkpoints that are older than the oldest kept one."""
        paths = checkpoint_paths(self.root)
        whole = [path for path in self._whole_paths() if is_own_checkpoint(path)]
        if len(whole) > self._keep:
            for path in paths[paths.index(whole[self._keep]) :]:
                if is_own_checkpoint(path):
                    self._delete(path)

    def _delete(self, path: Path) -> None:
        hidden = path.with_name(f".deleted-{path.name}")
        rename(path, hidden)
        shutil.rmtree(hidden)


class _Share(NamedTuple):
    """A rank's report of its part of a save to the main rank."""

    error: str | None
    files: dict[str, WrittenFile]
    shapes: dict[str, torch.Size]
    pieces: list[tuple[str, Piece]]

    def to_json(self) -> str:
        return json.dumps(self, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "_Share":
        error, files, shapes, pieces = json.loads(text)
        return cls(
            error,
            {name: WrittenFile(*file) for name, file in files.items()},
            {name: torch.Size(shape) for name, shape in shapes.items()},
            [(name, Piece(rank, Rectangle(*part))) for name, (rank, part) in pieces],
        )


def _is_whole(path: Path) -> bool:
    """Returns whether a folder holds the checkpoint that its name says, with files of the right sizes."""
    try:
        return path.name == checkpoint_name(CheckpointFolder(path).step)
    except BrokenIndexError:
        return False


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
