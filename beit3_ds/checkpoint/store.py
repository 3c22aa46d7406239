"""Saves and loads the checkpoints of a run under any layout of ranks. Training continues during a save."""

import itertools
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from beit3_ds.checkpoint.background_save import BackgroundSave, SaveOutcome
from beit3_ds.checkpoint.collection import CheckpointCollection
from beit3_ds.checkpoint.engine_state import EngineState
from beit3_ds.checkpoint.folder import CheckpointFolder
from beit3_ds.checkpoint.index import read_index
from beit3_ds.checkpoint.loading import agree_on_newest, load_checkpoint
from beit3_ds.checkpoint.run_description import RunDescription
from beit3_ds.config import ConfigError
from beit3_ds.parallel import Mesh, build_host_group


class CheckpointStore:
    """Saves and loads the checkpoints of one run, for the training loop.

    All ranks call `save`, `agree_on_newest`, `move_finished_aside` and `load` together. Of the other methods, only
    `finish` waits for other ranks. No random generator state is saved, because every draw depends only on the seed and
    the step.

    Attributes:
        root: folder of the checkpoints.
    """

    def __init__(self, root: Path, keep: int, mesh: Mesh, run: RunDescription, timeout_seconds: float) -> None:
        """Prepares for saving and loading. All ranks construct the store together. The first save creates the folder.

        Args:
            root: folder of the checkpoints, which all ranks must share.
            keep: number of complete checkpoints to keep.
            mesh: the mesh of ranks.
            run: description of this run, stored in every checkpoint.
            timeout_seconds: maximum seconds that ranks wait for each other during a save, and that training waits for a
                save.
        """
        self.root, self._mesh, self._run = root, mesh, run
        self._host = build_host_group(timedelta(seconds=timeout_seconds))  # separate from the group of the main threads
        self._collection = CheckpointCollection(root, keep)
        self._background = BackgroundSave(self._collection, mesh, self._host, run, timeout_seconds)

    def reserve_memory(self, state: EngineState) -> None:
        """Starts a thread that reserves host memory for saves, so that the first save is faster."""
        self._background.reserve_memory(state)

    def save(self, state: EngineState, step: int, data: Mapping[str, Any] | None = None) -> None:
        """Starts saving the state after `step` training steps; all ranks call it between two steps.

        Waits for the previous save, and copies the state to host memory. A thread then writes the copy to disk.

        Args:
            state: training state of this rank: weights and optimizer moments.
            step: number of training steps so far.
            data: position in the data and other state (`Index.data`); only the main rank's value is saved.

        Raises:
            ConfigError: on all ranks, if the optimizer's weights differ from the model's (`EngineState.find_mismatch`).
            StorageError: if the previous save does not end in time.
        """
        begun = time.monotonic()
        self._mesh.activity.begin("saving")
        self.finish()
        self._check_state(state, step)
        self._background.start(state, step, dict(data or {}), begun)

    def finish(self) -> None:
        """Waits for the end of the current save; returns immediately if no save is running.

        Raises:
            StorageError: if the save takes longer than `timeout_seconds`; earlier checkpoints stay unchanged.
        """
        self._background.wait()

    def take_outcomes(self) -> list[SaveOutcome]:
        """Returns the results of all saves that ended since the last call; does not wait for a running save."""
        return self._background.take_outcomes()

    def newest_path(self) -> Path | None:
        """Returns the newest checkpoint whose index and file sizes are right (`CheckpointCollection.newest_path`)."""
        return self._collection.newest_path()

    def agree_on_newest(self) -> CheckpointFolder | None:
        """Returns the newest undamaged checkpoint, on which all ranks agree; all ranks call this method.

        Returns:
            The checkpoint; None if the run has no checkpoints.

        Raises:
            ConfigError: on all ranks, if the folder of checkpoints cannot be read, or checkpoints exist but all are
                unusable.
        """
        return agree_on_newest(self._collection, self._mesh, self._host)

    def move_finished_aside(self, total_steps: int) -> None:
        """Renames the folder of checkpoints if the newest checkpoint has reached `total_steps`.

        All ranks call this method. The main rank prints the new name, such as `checkpoints-1`.
        """
        newest = self._host.broadcast(str(self.newest_path() or ""))
        if not newest or read_index(Path(newest)).step < total_steps:
            return
        if self._mesh.is_main:
            numbers = itertools.count(1)
            aside = next(path for n in numbers if not (path := self.root.with_name(f"{self.root.name}-{n}")).exists())
            self.root.rename(aside)
            print(f"the checkpoints of the finished run are now in {aside}", flush=True)
        self._host.barrier()

    def load(self, state: EngineState, folder: CheckpointFolder) -> int:
        """Loads the training state from a checkpoint of any layout; all ranks call this method.

        Returns:
            Number of training steps before the checkpoint was saved. This is also the index of the next step.

        Raises:
            ConfigError: if the checkpoint has another task, another model or other tokenizers, or a file contradicts
                the index.
        """
        return load_checkpoint(state, folder, self._run, self._mesh)

    def _check_state(self, state: EngineState, step: int) -> None:
        faults = self._host.gather(state.find_mismatch(step))
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
