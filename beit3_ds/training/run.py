"""Holds the parts of a training run that the training loop, evaluations and reports use."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.checkpoint.engine_state import EngineState
from beit3_ds.checkpoint.folder import CheckpointFolder
from beit3_ds.checkpoint.store import CheckpointStore
from beit3_ds.config import RunConfig
from beit3_ds.config.data import Split
from beit3_ds.data.order.run import RunOrder
from beit3_ds.model import StageModel
from beit3_ds.parallel import Mesh
from beit3_ds.pipeline.schedule import Schedule
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks import RankTask, Term
from beit3_ds.training.best_checkpoint import BestCheckpoint
from beit3_ds.training.broken_records import BrokenRecords
from beit3_ds.training.device_moves import DeviceMoves
from beit3_ds.training.metrics_log import MetricsLog
from beit3_ds.training.progress import Progress
from beit3_ds.training.split_batches import iterate_together
from beit3_ds.training.stragglers import Stragglers


@dataclass(frozen=True, kw_only=True)
class Run:
    """Holds the parts of a training run. `train.build_run` builds it."""

    config: RunConfig
    schedule: Schedule
    state: EngineState
    mesh: Mesh
    device: torch.device
    moves: DeviceMoves
    """Moves micro-batches to the device."""
    terms: tuple[Term, ...]
    """Loss terms of the task."""
    rank_task: RankTask
    """The task on this rank, with its files open."""
    validation: Iterable[PackedBatch]
    read_validation: Callable[[], None]
    """Function that loads this rank's validation batches into memory. After a stop signal, it returns before all are
    loaded."""
    splits: Mapping[Split, Iterable[PackedBatch]]
    """This rank's batches of each split that the task evaluates, by split. Each iteration reads them from disk again.
    """
    store: CheckpointStore
    results: ResultFolder
    """Output folder, to which the main rank writes pages and pictures."""
    metrics_log: MetricsLog
    progress: Progress
    stragglers: Stragglers
    first_step: int
    """Number of steps done before this process started."""
    broken_records: BrokenRecords
    """Broken records found so far, including those before a restart."""
    best: BestCheckpoint
    """Best evaluation so far, including evaluations before a restart."""
    order: RunOrder | None
    """Order of the samples; None on ranks that receive their samples from other ranks."""
    data: Mapping[str, Any]
    """`Index.data` of the resumed checkpoint, such as the position in the training data; empty without a checkpoint."""
    is_stopping: Callable[[], bool]
    """Function that returns whether this rank has received a stop signal."""

    @property
    def engine(self) -> DeepSpeedEngine:
        """Returns DeepSpeed's engine around the layers of this pipeline stage."""
        return self.schedule.engine

    @property
    def model(self) -> StageModel:
        """Returns the layers of this pipeline stage."""
        model: StageModel = self.engine.module
        return model

    def prepare(self, batch: PackedBatch) -> PackedBatch:
        """Moves a micro-batch to the device, and adds the targets that the head needs."""
        return self.rank_task.prepare(self.moves.take(batch), self.device)

    def batches(self, split: Split) -> Iterable[PackedBatch]:
        """Returns this rank's share of the samples of a split."""
        return self.splits[split]

    def predict(self, batches: Iterable[PackedBatch]) -> Iterator[tuple[PackedBatch, Any]]:
        """Yields each prepared batch with the head's predictions, which are None on all pipeline stages but the last.

        Raises:
            StopRequestedError: on all ranks, if a rank received a stop signal.
        """
        together = iterate_together(batches, self.mesh, self.is_stopping)
        yield from self.schedule.run_forward(together, None, self.prepare)

    def trained_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the name and tensor of each float32 weight and each buffer in the newest checkpoint, on the CPU."""
        path = self.store.newest_path()
        assert path is not None, "a run ends with a checkpoint"
        folder = CheckpointFolder(path)
        yield from ((name, folder.read(name)) for name in folder.names())
        yield from ((name, folder.read_buffer(name)) for name in folder.index.buffers)
        folder.close()
