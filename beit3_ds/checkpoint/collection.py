"""Finds, publishes and deletes the checkpoints in the folder of one run, without communication between ranks."""

import contextlib
import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from beit3_ds.checkpoint.disk import NewFile, rename, sync_folder, write_whole
from beit3_ds.checkpoint.folder import (
    check_files,
    checkpoint_name,
    checkpoint_paths,
    is_own_checkpoint,
    left_over_paths,
)
from beit3_ds.checkpoint.index import INDEX_NAME, PIECES_FILE, BrokenIndexError, Index, read_index
from beit3_ds.checkpoint.pieces import PieceTable, check_cover, write_pieces

_LATEST = "latest"


class CheckpointCollection:
    """Manages the folder `OUTPUT_DIR/checkpoints`, which has one subfolder `step-XXXXXXXX` per checkpoint.

    A checkpoint is written under a temporary name, synced to disk, and then renamed. So an interrupted save leaves no
    incomplete folder with the final name. A checkpoint is incomplete only if its files were changed or lost later. The
    file `latest` contains the name of the newest checkpoint.

    Attributes:
        root: path of the folder, on storage that all ranks share.
    """

    def __init__(self, root: Path, keep: int) -> None:
        """Stores the arguments; the first save creates the folder.

        Args:
            root: path of the folder.
            keep: number of complete checkpoints to keep, in addition to the checkpoint of the best evaluation.
        """
        self.root, self._keep = root, keep
        self._damaged: set[Path] = set()
        self._existed = root.exists()

    def path(self, step: int) -> Path:
        """Returns the path of the checkpoint after `step` training steps."""
        return self.root / checkpoint_name(step)

    def paths(self) -> list[Path]:
        """Returns the paths of all checkpoints, newest first, including incomplete checkpoints.

        Raises:
            OSError: if the folder exists but cannot be read, or is a link to a missing folder, perhaps on an unmounted
                disk.
        """
        if self.root.is_symlink():
            self.root.stat()
        return checkpoint_paths(self.root)

    def newest_path(self) -> Path | None:
        """Returns the newest complete checkpoint. Reads only the indices of checkpoints and the sizes of files.

        Returns:
            Path of the checkpoint; None if no checkpoint is complete or the folder cannot be read.
        """
        try:
            return next(self._whole_paths(), None)
        except OSError:
            return None

    def mark_damaged(self, path: Path) -> None:
        """Records that a checkpoint is damaged, although its files have the right sizes.

        `newest_path` then skips the checkpoint, and the deletion of old checkpoints does not count it as complete.
        """
        self._damaged.add(path)

    def mark_whole(self, path: Path) -> None:
        """Reverts `mark_damaged` after a new save has replaced the damaged checkpoint."""
        self._damaged.discard(path)

    def create_temporary(self, step: int) -> Path:
        """Creates the empty temporary folder for the checkpoint of a step.

        Also deletes temporary folders from interrupted saves and deletions.

        Raises:
            OSError: if the folder cannot be created, or a folder with this name contains files of another program.
        """
        temporary = self.temporary_path(step)
        for left_over in left_over_paths(self.root):
            shutil.rmtree(left_over, ignore_errors=left_over != temporary)  # only `temporary` must be gone
        try:
            temporary.mkdir()
        except FileExistsError:
            raise OSError(
                f"{temporary} is in the way and holds files that this program did not write; move it"
            ) from None
        except FileNotFoundError:
            if self._existed:
                print(f"WARNING: {self.root} is gone, with the checkpoints in it; it is created again", flush=True)
            temporary.mkdir(parents=True)
        self._existed = True
        try:
            sync_folder(self.root.parent)
        except OSError:
            temporary.rmdir()
            raise
        return temporary

    def temporary_path(self, step: int) -> Path:
        """Returns the path of the temporary folder for the checkpoint of a step."""
        return self.root / f".writing-{checkpoint_name(step)}"

    def publish(self, index: Index, pieces: PieceTable) -> None:
        """Completes a checkpoint after all ranks have written their files, and deletes old checkpoints.

        Writes the table of pieces and the index into the temporary folder, and renames the folder.

        Args:
            index: index of the checkpoint, without an entry for the file with the table of pieces.
            pieces: table of the tensor slices that all ranks wrote.

        Raises:
            OSError: if a file that the index lists is missing, or writing fails.
            BrokenIndexError: if the pieces do not cover every element of every tensor exactly once.
        """
        temporary, target = self.temporary_path(index.step), self.path(index.step)
        check_cover(index.shapes, pieces)
        index = dataclasses.replace(index, files={**index.files, PIECES_FILE: write_pieces(temporary, pieces)})
        with NewFile(temporary / INDEX_NAME) as file:
            file.write(index.to_json())
        sync_folder(temporary)
        try:
            check_files(temporary, index)
        except BrokenIndexError as error:
            raise OSError(f"{error} on the main rank: is {self.root} on a file system that all ranks share?") from None
        if os.path.lexists(target):
            self._clear(target)
        rename(temporary, target)
        self.mark_whole(target)  # before `_prune` counts the whole checkpoints
        self._write_latest(target.name)
        with contextlib.suppress(OSError):  # the new checkpoint is safe; the next save deletes the rest
            self._prune(index.best_step)

    def discard_temporary(self, step: int) -> None:
        """Deletes the temporary folder of a failed save."""
        shutil.rmtree(self.temporary_path(step), ignore_errors=True)

    def _whole_paths(self) -> Iterator[Path]:
        return (path for path in self.paths() if path not in self._damaged and _has_all_files(path))

    def _clear(self, target: Path) -> None:
        """Makes the path `target` free: deletes a checkpoint of this program, or renames anything else."""
        if is_own_checkpoint(target):
            _delete(target)
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

    def _prune(self, best_step: int | None) -> None:
        """Deletes old checkpoints. Keeps the newest complete ones, the one of step `best_step`, and all that another
        program wrote.
        """
        paths = self.paths()
        best = None if best_step is None else self.path(best_step)
        whole = [path for path in self._whole_paths() if is_own_checkpoint(path) and path != best]
        if len(whole) > self._keep:
            for path in paths[paths.index(whole[self._keep]) :]:
                if path != best and is_own_checkpoint(path):
                    _delete(path)


def _has_all_files(path: Path) -> bool:
    """Returns whether a checkpoint folder contains all files with the right sizes, and is named after the checkpoint's
    step.
    """
    try:
        index = read_index(path)
        check_files(path, index)
        return path.name == checkpoint_name(index.step)
    except BrokenIndexError:
        return False


def _delete(path: Path) -> None:
    hidden = path.with_name(f".deleted-{path.name}")
    rename(path, hidden)
    shutil.rmtree(hidden)


def has_checkpoints(output_dir: Path) -> bool:
    """Returns whether a run has complete or incomplete checkpoints; True if the checkpoint folder cannot be read.

    Args:
        output_dir: output folder of the run (`training.output_dir`).
    """
    try:
        return bool(CheckpointCollection(output_dir / "checkpoints", keep=1).paths())
    except OSError:
        return True
