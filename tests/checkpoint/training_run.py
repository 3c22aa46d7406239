"""Starts real runs of the trainer that tests kill, stop and restart; each rank is a process with a log file."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from beit3_ds.checkpoint.folder import CheckpointFolder
from beit3_ds.checkpoint.index import KINDS
from beit3_ds.checkpoint.slices import whole_slice
from beit3_ds.checkpoint.store import CheckpointStore
from tests.preloaded import ModuleProcess, start_module

_TIMEOUT_SECONDS = 120


class TrainingRun:
    """Controls a run below a folder; its ranks can be started repeatedly."""

    module = "tests.checkpoint.training_run"
    """Module that every rank runs."""

    def __init__(self, mapping: dict[str, Any], folder: Path, num_ranks: int = 1, **training: Any) -> None:
        folder.mkdir()
        self._num_ranks, self._folder = num_ranks, folder
        self.output_dir = folder / "run"
        self.checkpoints = self.output_dir / "checkpoints"
        mapping["beit3_ds"]["training"] |= {**training, "output_dir": str(self.output_dir)}
        (folder / "config.json").write_text(json.dumps(mapping))
        self.ranks: list[ModuleProcess] = []

    @contextmanager
    def started(self, failing_saves: Sequence[int] = ()) -> Iterator["TrainingRun"]:
        """Starts the ranks, and kills the remaining ones when the block ends.

        Args:
            failing_saves: steps whose checkpoints cannot be renamed to their final names. If there are any, the loop
                waits for each save, as on a very fast disk.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.ranks = []
        for rank in range(self._num_ranks):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self._num_ranks, "MASTER_PORT": port}
            environment = os.environ | {name: str(value) for name, value in names.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
            arguments = [self._folder, *map(str, failing_saves)]
            with self._log(rank).open("w") as log:
                self.ranks.append(start_module(self.module, arguments, env=environment, output=log))
        try:
            yield self
        finally:
            for process in self.ranks:
                process.kill()
                process.wait()

    def finish(self, failing_saves: Sequence[int] = ()) -> list[int]:
        """Starts the ranks and waits for their end; returns their exit statuses."""
        with self.started(failing_saves):
            return self.wait()

    def wait(self) -> list[int]:
        """Waits for the end of all ranks; returns their exit statuses."""
        try:
            return [process.wait(_TIMEOUT_SECONDS) for process in self.ranks]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a rank does not end: {self.output()}") from None

    def wait_until(self, happened: Callable[[], Any], interval: float = 0.005) -> None:
        """Waits until a condition holds; fails if a rank ends before, or after a time-out."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while not happened():
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in self.ranks), self.output()
            time.sleep(interval)

    def output(self, rank: int = 0) -> str:
        """Returns the output of a rank since the last start."""
        return self._log(rank).read_text() if self._log(rank).exists() else ""

    def reported_step(self) -> int:
        """Returns the step of the last checkpoint reported as saved since the start, or 0."""
        return max(map(int, re.findall(r"^saved .*/step-(\d+) \(", self.output(), re.MULTILINE)), default=0)

    def checkpoint(self, step: int) -> CheckpointFolder:
        """Opens a checkpoint, and checks that its files are unchanged since the save."""
        checkpoint = CheckpointFolder(self.checkpoints / f"step-{step:08d}")
        assert checkpoint.find_damage(checkpoint.index.files) is None
        return checkpoint

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.log"


def check_same_state(ours: CheckpointFolder, expected: CheckpointFolder) -> None:
    """Checks that weights, moments and counts of two checkpoints are equal bit for bit."""
    assert (ours.step, ours.index.optimizer_step) == (expected.step, expected.index.optimizer_step)
    assert ours.names() == expected.names()
    for name in ours.names():
        part = whole_slice(ours.shape(name))
        for kind in KINDS:
            same = torch.equal(ours.read_kind(kind, name, part), expected.read_kind(kind, name, part))
            assert same, f"{kind} of {name} differs"
    ours.close()
    expected.close()


def train(folder: str, failing_saves: list[str]) -> None:
    os.setsid()  # so that whatever it starts can be found
    torch.set_num_threads(1)
    if failing_saves:
        _fail_saves({f"step-{int(step):08d}" for step in failing_saves})
    from beit3_ds.train import main

    sys.exit(main([f"{folder}/config.json"]))


def _fail_saves(names: set[str]) -> None:
    replace, save = os.replace, CheckpointStore.save

    def save_at_once(store: CheckpointStore, *arguments: Any) -> None:
        save(store, *arguments)
        store.finish()

    def failing(source: Any, target: Any) -> None:
        if Path(target).name in names:
            raise OSError(28, os.strerror(28))
        replace(source, target)

    os.replace, CheckpointStore.save = failing, save_at_once


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2:])
