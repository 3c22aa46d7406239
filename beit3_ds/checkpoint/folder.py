"""Reads checkpoints that were written under any layout of ranks, and finds checkpoints in a folder."""

import errno
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from beit3_ds.checkpoint.disk import file_sha256
from beit3_ds.checkpoint.index import (
    AVERAGE,
    BUFFERS,
    FILE_KINDS,
    INDEX_NAME,
    PIECES,
    WEIGHT,
    BrokenIndexError,
    Index,
    file_name,
    read_index,
    tensor_key,
)
from beit3_ds.checkpoint.pieces import read_pieces
from beit3_ds.checkpoint.slices import BLOCK_ELEMENTS, TensorSlice, whole_slice
from beit3_ds.checkpoint.tensor_file import BrokenTensorFileError, TensorEntry, TensorFile
from beit3_ds.config import ConfigError, ModelConfig
from beit3_ds.config.strict import load_section
from beit3_ds.cores import count_cores
from beit3_ds.printing import printable

_SHOWN = 80
_NAME = re.compile("step-([0-9]{8}|[1-9][0-9]{8,})")
_LEFT_OVER = re.compile(rf"\.(writing|deleted)-{_NAME.pattern}")
_FILE_NAME = re.compile(rf"{re.escape(INDEX_NAME)}|({'|'.join((*FILE_KINDS, BUFFERS, PIECES))})-\d{{5,}}\.safetensors")
_FILE_OF_KIND = {kind: file for file, kinds in FILE_KINDS.items() for kind in kinds}


class CheckpointFolder:
    """Reads a complete checkpoint. A checkpoint is complete if its index is valid, and all files exist with the right
    sizes.

    `find_damage` and `find_fault` read whole files to verify their digests. Other methods read only the requested
    values.
    """

    def __init__(self, path: Path, weights: str = WEIGHT) -> None:
        """Reads the index and the table of tensor slices.

        Args:
            path: folder of the checkpoint.
            weights: values that `read` returns: `index.WEIGHT` (weights) or `index.AVERAGE` (moving averages).

        Raises:
            BrokenIndexError: if the checkpoint is incomplete or damaged; the message describes the fault briefly.
        """
        self.path, self.index, self._weights = path, read_index(path), weights
        check_files(path, self.index)
        self.pieces = read_pieces(path, self.index)
        self._opened: dict[str, TensorFile] = {}

    @property
    def model(self) -> ModelConfig:
        """Returns the configuration of the model.

        Raises:
            ConfigError: if the model is not a BEiT-3 model, but for example a visual tokenizer.
        """
        name = self.index.run.task_name
        if "ffn_hidden_size" not in self.index.run.model:
            raise ConfigError(
                f"checkpoint {self.path} belongs to the task {name}, which trains no BEiT-3. Its result is the file "
                "that tokenizers.visual.path names."
            )
        return load_section(ModelConfig, self.index.run.model, f"checkpoint {self.path}: model")

    @property
    def step(self) -> int:
        """Returns the number of training steps before the checkpoint was saved."""
        return self.index.step

    @property
    def task(self) -> Mapping[str, Any] | None:
        """Returns the name and settings of the run's task; None in checkpoints of older versions."""
        task: Mapping[str, Any] | None = self.index.run.config.get("task")
        return task

    def files(self, kind: str | None = None) -> list[str]:
        """Returns the names of the checkpoint's files in sorted order.

        Args:
            kind: kind of the files, either `BUFFERS` or a key of `FILE_KINDS`; None selects all files.
        """
        return sorted(name for name in self.index.files if kind is None or name.startswith(f"{kind}-"))

    def find_damage(self, names: Iterable[str]) -> str | None:
        """Verifies the digests of the given files; returns a short description of the first fault, or None."""
        return next(filter(None, map(self.find_fault, names)), None)

    def find_fault(self, name: str) -> str | None:
        """Verifies the digest of one file; returns a short description of the fault, or None."""
        try:
            digest = file_sha256(self.path / name)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return None if digest == self.index.files[name].sha256 else f"{name} was changed: its digest is another"

    @property
    def has_averages(self) -> bool:
        """Returns whether the checkpoint contains moving averages of the weights."""
        return bool(self.files(_FILE_OF_KIND[AVERAGE]))

    def names(self) -> list[str]:
        """Returns the names of all tensors in the checkpoint."""
        return list(self.index.shapes)

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a whole tensor, as in a model without parallelism.

        Raises:
            ConfigError: if the checkpoint does not contain the tensor.
        """
        if name not in self.index.shapes:
            raise ConfigError(
                f"checkpoint {self.path} has no tensor {name[:_SHOWN]!r}, which its model needs. Name another one of "
                "the run."
            )
        return self.index.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Returns float32, because `read` returns every tensor in float32."""
        return torch.float32

    def read(self, name: str, part: TensorSlice | None = None) -> Tensor:
        """Returns a weight tensor, or its moving average, in float32.

        The constructor's argument `weights` selects between the two.

        Without `part`, the result has the tensor's own shape. With `part`, the tensor is viewed as a matrix, and the
        result is only this slice of the matrix.

        Raises:
            ConfigError: if a file contradicts the index, which happens only if someone edited the file and its digest.
        """
        try:
            values = self.read_kind(self._weights, name, part or whole_slice(self.shape(name)))
        except (BrokenIndexError, BrokenTensorFileError) as error:
            raise ConfigError(
                f"checkpoint {self.path} cannot be read, though its digests fit: {error}. Name another one of the run."
            ) from error
        return values if part else values.view(self.shape(name))

    def release_pages(self) -> None:
        """Does nothing: this reader does not memory-map files."""

    def read_kind(self, kind: str, name: str, part: TensorSlice) -> Tensor:
        """Views a tensor's weights, moments or averages as a matrix, and reads a slice of the matrix in float32.

        Args:
            kind: one of `index.KINDS`, or `index.AVERAGE`. Averages that the checkpoint lacks are replaced by the
                weights.
            name: name of the tensor.
            part: slice of the matrix.

        Raises:
            BrokenIndexError: if a file cannot be opened.
            BrokenTensorFileError: if a file lacks values that the index lists.
        """
        if kind == AVERAGE and not self.has_averages:
            kind = WEIGHT
        values = torch.empty(part.shape)
        for rank, piece in self.pieces.overlapping(name, part):
            if common := part.intersection(piece):
                file = self._open(file_name(_FILE_OF_KIND[kind], rank))
                rows, columns = common.inside(piece)
                key = tensor_key(kind, self.index.stored_name(name), piece)
                if file.entries.get(key) != TensorEntry(key, torch.float32, piece.shape):
                    raise BrokenTensorFileError(f"{file.path} has no {key} in float32")
                target = values[common.inside(part)]
                if target.is_contiguous() and target.shape[1] == piece.shape[1]:
                    file.read_rows_into(target, key, rows.start)
                    continue
                step = max(1, BLOCK_ELEMENTS // piece.shape[1])  # the rows of the piece may be wider than the slice
                for top in range(rows.start, rows.stop, step):
                    stop = min(top + step, rows.stop)
                    target[top - rows.start : stop - rows.start].copy_(file.read_rows(key, top, stop)[:, columns])
        return values

    def read_buffer(self, name: str) -> Tensor:
        """Reads a persistent buffer in its own dtype and shape.

        Raises:
            BrokenIndexError: if the file with the buffer cannot be opened.
            BrokenTensorFileError: if the file has no such buffer with the dtype and shape in the index.
        """
        rank, dtype, shape = self.index.buffers[name]
        file = self._open(file_name(BUFFERS, rank))
        entry = file.entries.get(name)
        if entry is None or (str(entry.dtype), entry.shape) != (f"torch.{dtype}", shape):
            raise BrokenTensorFileError(f"{file.path} has no {name} of type {dtype} and shape {list(shape)}")
        return file.read(name)

    def close(self) -> None:
        """Closes all open files."""
        for file in self._opened.values():
            file.close()
        self._opened.clear()

    def _open(self, name: str) -> TensorFile:
        if name not in self._opened:
            try:
                self._opened[name] = TensorFile(self.path / name)
            except (BrokenTensorFileError, OSError) as error:
                raise BrokenIndexError(f"{name} cannot be read: {error}") from None
        return self._opened[name]


def check_files(path: Path, index: Index) -> None:
    """Checks that every file in a checkpoint's index exists and has the right size.

    Args:
        path: folder of the checkpoint.
        index: index of the checkpoint.

    Raises:
        BrokenIndexError: if a file is missing or has another size; the message names the file.
    """
    for name, written in index.files.items():
        try:
            status = (path / name).lstat()
        except FileNotFoundError:
            raise BrokenIndexError(f"{name} is missing") from None
        except OSError as error:
            raise BrokenIndexError(f"{name} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise BrokenIndexError(f"{name} is not a regular file")
        size = status.st_size
        if size != written.num_bytes:
            raise BrokenIndexError(f"{name} has {size} bytes instead of {written.num_bytes}")


def checkpoint_name(step: int) -> str:
    """Returns the folder name of a checkpoint, such as `step-00001000`."""
    return f"step-{step:08d}"


def checkpoint_paths(folder: Path) -> list[Path]:
    """Returns the subfolders of `folder` that have the name of a checkpoint, newest first; some may be incomplete.

    Files, links and other names, such as a copy `step-00000002.bak`, are ignored.

    Raises:
        OSError: if the folder exists but cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries if _NAME.fullmatch(entry.name) and _is_folder(entry)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            return []
        raise
    return [folder / name for name in sorted(found, key=lambda name: int(name.partition("-")[2]), reverse=True)]


def is_own_checkpoint(path: Path) -> bool:
    """Returns whether a folder contains only a checkpoint of this program, so that deleting the folder is safe.

    The index must be readable, contain the same step as the folder's name, and list every file in the folder.
    """
    try:
        index = read_index(path)
        return path.name == checkpoint_name(index.step) and _holds_only(path, lambda name: name in index.files)
    except (BrokenIndexError, OSError):
        return False


def left_over_paths(folder: Path) -> list[Path]:
    """Returns the temporary subfolders of `folder` that remain after this program was interrupted while it saved or
    deleted a checkpoint.
    """
    found = [path for path in folder.glob(".*-step-*") if _LEFT_OVER.fullmatch(path.name)]
    return [path for path in found if _holds_only(path, lambda name: _FILE_NAME.fullmatch(name) is not None)]


def _holds_only(folder: Path, is_own: Callable[[str], bool]) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return all(
            entry.is_file(follow_symlinks=False) and (entry.name == INDEX_NAME or is_own(entry.name))
            for entry in entries
        )


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    return entry.is_dir(follow_symlinks=False)


def is_checkpoint(path: Path) -> bool:
    """Returns whether a path names a checkpoint, a folder of checkpoints, or a run's folder with checkpoints."""
    return (path / INDEX_NAME).is_file() or bool(checkpoint_paths(path) or checkpoint_paths(path / "checkpoints"))


def open_checkpoint(path: Path, kind: str | None = "weights", *, averages: bool = False) -> CheckpointFolder:
    """Opens a checkpoint, or the newest complete checkpoint of a run, and verifies the digests of its files.

    Skips faulty checkpoints of a run, and prints their faults to stderr.

    Args:
        path: a checkpoint, a folder of checkpoints, or `training.output_dir` of a run.
        kind: kind of files to verify, a key of `FILE_KINDS`. With None, all files are verified. With an empty string,
            no file is verified.
        averages: whether to read moving averages instead of weights. If true, the files of averages are verified and
            `kind` is ignored.

    Raises:
        ConfigError: if there is no complete checkpoint, or the checkpoint lacks the requested averages.
    """
    if averages:
        kind = _FILE_OF_KIND[AVERAGE]
    own = [path] if (path / INDEX_NAME).is_file() or _NAME.fullmatch(path.name) else []
    for candidate in own or checkpoint_paths(path) or checkpoint_paths(path / "checkpoints"):
        try:
            folder = CheckpointFolder(candidate, AVERAGE if averages else WEIGHT)
        except BrokenIndexError as error:
            fault: str | None = str(error)
        else:
            misnamed = not own and candidate.name != checkpoint_name(folder.step)
            fault = f"it holds step {folder.step}" if misnamed else _find_damage_fast(folder, folder.files(kind))
            if fault is None and averages and not folder.has_averages:
                raise ConfigError(
                    f"{candidate} holds no moving average of the weights: its run had no training.ema_decay. Export "
                    "the weights themselves, without --ema."
                )
            if fault is None:
                return folder
        if own:
            raise ConfigError(f"checkpoint {path} is not whole: {fault}. Name another one of the run.")
        print(f"checkpoint {printable(f'{candidate} is not whole: {fault}')}", file=sys.stderr)
    raise ConfigError(f"{path} holds no whole checkpoint. Name another one of the run, or its checkpoints' folder.")


def best_checkpoint_path(path: Path) -> Path:
    """Returns the path of a run's best checkpoint (`training.best_metric`). The newest checkpoint records which one is
    the best.

    Args:
        path: a folder of checkpoints, or `training.output_dir` of a run.

    Raises:
        ConfigError: if there is no complete checkpoint, the newest checkpoint records no best checkpoint, or the best
            checkpoint does not exist.
    """
    newest = open_checkpoint(path, kind="")
    best = newest.index.best_step
    found = None if best is None else newest.path.parent / checkpoint_name(best)
    if found is None or not (found / INDEX_NAME).is_file():
        reason = "its run had no training.best_metric" if best is None else f"{found} is not there"
        raise ConfigError(f"{path} has no best checkpoint: {reason}. Leave out --best, or name a checkpoint.")
    return found


def _find_damage_fast(folder: CheckpointFolder, names: Sequence[str]) -> str | None:
    """Does the same as `find_damage`, but with one thread per core and with a progress bar."""
    with ThreadPoolExecutor(count_cores()) as pool:
        faults = pool.map(folder.find_fault, names)
        text = f"checking {folder.path.name}"
        bar = tqdm(faults, total=len(names), desc=text, unit="file", disable=None, leave=False)
        fault = next(filter(None, bar), None)
        pool.shutdown(cancel_futures=True)
    return fault
