"""Runs this project's fine-tuning steps in one process."""

import functools
from collections.abc import Callable

import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.benchmarks.finetune.cases import CASES
from beit3_ds.config import RunConfig
from beit3_ds.model import StepLoss, TaskModel
from beit3_ds.tasks.retrieval.contrastive import contrastive_sums


def step_loss_of(task: str) -> StepLoss | None:
    """Returns a task's `StepLoss` if the loss compares all samples of a step with each other, else None."""
    return functools.partial(contrastive_sums, mask_duplicates=False) if task == "retrieval" else None


def loss_factors(task: str, batch: PackedBatch) -> torch.Tensor:
    """Returns the factors by which the sums of the loss terms are multiplied, in a step with one micro-batch."""
    weights = [0.5, 0.5, 0.0, 0.0] if task == "retrieval" else [1.0, 0.0]
    if task == "captioning":
        return torch.tensor(weights) / sum(batch.head_row_counts)
    return torch.tensor(weights) / (batch.num_images + batch.num_pairs)


class Trainer:
    """Trains the model of one task with DeepSpeed's engine at a constant learning rate."""

    def __init__(self, task: str, config: RunConfig) -> None:
        """Builds the engine, and a process group that contains only this process."""
        # Imported here, so that DeepSpeed takes memory only in the process that measures this project.
        from beit3_ds.pipeline.schedule import Schedule
        from beit3_ds.runtime.process_group import compute_device, init_process_group
        from beit3_ds.training.engine import apply_update, build_engine

        self.task, self.device = task, compute_device()
        self._mesh, self._apply_update = init_process_group(config.parallel, config.training.output_dir), apply_update
        training = config.training
        model = TaskModel(
            CASES[task].build_head,
            config.model,
            activation_checkpointing=training.activation_checkpointing,
            fp32_residual_connection=training.fp32_residual_connection,
        )
        model.initialize(training.seed)
        chunks = [range(config.model.num_pipeline_layers)]
        self.schedule = Schedule(build_engine(config, model, self._mesh), chunks, self._mesh, step_loss_of(task))

    def prepare(self, batch: PackedBatch) -> Callable[[], float]:
        """Moves a batch to the device. Returns a function that trains one step on the batch and returns the loss."""
        on_device, factors = batch.to(self.device), loss_factors(self.task, batch).to(self.device)

        def step() -> float:
            sums = self.schedule.accumulate_gradients([on_device], factors, lambda prepared: prepared)
            self._apply_update(self.schedule.engine, self._mesh)
            return float(sums @ factors)

        return step
