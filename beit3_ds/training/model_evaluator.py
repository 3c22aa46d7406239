"""Runs a loaded model on the samples of a split, without training."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.config.data import Split
from beit3_ds.model import StageModel
from beit3_ds.model.adaptation import AdaptedWeights
from beit3_ds.parallel import Mesh
from beit3_ds.pipeline.schedule import Schedule
from beit3_ds.tasks import RankTask, Term
from beit3_ds.training.evaluation import SourceNames, evaluate
from beit3_ds.training.split_batches import iterate_together


@dataclass(frozen=True, kw_only=True)
class ModelEvaluator:
    """Provides a loaded model, its mesh and batches to a task's evaluation (`tasks.Evaluator`)."""

    schedule: Schedule
    mesh: Mesh
    device: torch.device
    terms: tuple[Term, ...]
    rank_task: RankTask
    """The task on this rank, with the split's files open."""
    weights: AdaptedWeights
    """Weights on disk from which the model was loaded."""
    validation: Iterable[PackedBatch]
    """Batches over which `mean_terms` averages; empty for tasks that evaluate whole splits instead."""
    splits: Mapping[Split, Iterable[PackedBatch]]
    """Batches that this rank evaluates, by split. Together, the data-parallel ranks' batches contain every sample."""
    is_stopping: Callable[[], bool]
    """Function that returns whether this rank has received a stop signal."""

    @property
    def model(self) -> StageModel:
        """Returns the layers of this pipeline stage."""
        module: StageModel = self.schedule.engine.module
        return module

    def batches(self, split: Split) -> Iterable[PackedBatch]:
        """Returns this rank's share of the samples of a split."""
        return self.splits[split]

    def prepare(self, batch: PackedBatch) -> PackedBatch:
        """Moves a batch to the device, and adds the targets that the head needs."""
        return self.rank_task.prepare(batch, self.device)

    def predict(self, batches: Iterable[PackedBatch]) -> Iterator[tuple[PackedBatch, Any]]:
        """Yields each prepared batch with the head's predictions, which are None on all pipeline stages but the last.

        Raises:
            StopRequestedError: on all ranks, if a rank received a stop signal.
        """
        together = iterate_together(batches, self.mesh, self.is_stopping)
        yield from self.schedule.run_forward(together, None, self.prepare)

    def trained_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Reads each parameter of this pipeline stage from the weights on disk, and yields its name and its float32
        tensor.
        """
        for name, _ in self.model.named_parameters():
            yield name, self.weights.read(name).float()

    def mean_terms(self, source_names: SourceNames) -> dict[str, float]:
        """Returns the mean of each loss term over the `validation` batches of all ranks. All ranks must call this
        method.

        If a term's samples come from several sources, the result also has the mean over each source, under
        "TERM/SOURCE".

        Args:
            source_names: names of the sources, by kind of sample.
        """
        return evaluate(self.schedule, self.validation, self.prepare, self.terms, self.mesh, self.device, source_names)
