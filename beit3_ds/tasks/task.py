"""What a task is: everything that the trainer asks of pretraining, and of every other task.

A task is one folder of `beit3_ds/tasks`, named by `"task": {"name": ...}` in the file of a run; a name with dots is a
module anywhere. The module has a class `TASK`, a subclass of `Task`. The trainer knows terms and opaque tensors only:

    Task        built from the configuration alone, also by `beit3 check`: terms, model, costs
    RankTask    opened by one rank: the samples it reads, how a micro-batch is prepared, what is reported

Where further needs of a task go:

    several sequences per sample, or pooled rows    `PackedBatch.head_rows`, and the head joins what it reads
    another attention mask                          a field of `PackedBatch` that `model/attention.py` passes to the op
    no text, no image, another image size           `model` in the file; the streams that the task opens
    metrics                                         a term of weight 0: its sum and count merge exactly over ranks
    other learning rates, frozen parts, an EMA      `training/optimizer.py`, by names that the task gives
    terms over features of the whole step           two passes per step: `PackedBatch` carries all draws, so that both
                                                    compute the same features
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig, RunConfig
from beit3_ds.config.prefetch import plan_prefetch
from beit3_ds.data import StepDataset, ValidationBatches, build_validation_batches
from beit3_ds.data.packing import Pack
from beit3_ds.data.samples import SourceSamples, Stream, name_sources
from beit3_ds.data.validation_overlap import check_validation_apart
from beit3_ds.model import Head, TaskModel
from beit3_ds.parallel import Mesh, TensorParallel

Split = Literal["train", "validation"]
"""Which of the sources of a stream."""


class Term(NamedTuple):
    """A part of the loss, or a metric: a sum over samples or positions, divided by their number in the whole step."""

    name: str
    """Its name in logs, metrics and messages."""
    stream: str
    """The stream whose samples it is computed on."""
    title: str
    """Its name for people, above plots."""
    weight: float = 1.0
    """Its weight in the loss; 0 for a metric."""
    unit: str = "cross entropy (nats)"
    """Its unit, beside plots."""


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """What one rank reads of every step."""

    data_parallel_rank: int
    """Its rank among those that read different samples."""
    data_parallel_size: int
    """Number of these ranks."""
    embeds: bool
    """Whether it needs the model's inputs: the first stage of a pipeline."""
    predicts: bool
    """Whether it needs targets: the last stage of a pipeline."""
    reads: bool
    """Whether it reads samples at all; others receive theirs from ranks that read (`Mesh.is_reader`)."""


class Evaluator(Protocol):
    """The trained model as a task sees it at the end of a run."""

    @property
    def mesh(self) -> Mesh:
        """The ranks."""

    @property
    def device(self) -> torch.device:
        """The device of this rank."""

    @property
    def validation(self) -> Iterable[PackedBatch]:
        """This rank's validation batches, as they are read."""

    def predict(self, batches: Iterable[PackedBatch]) -> Iterator[tuple[PackedBatch, Any]]:
        """Yields each batch, prepared, with the head's predictions on the last stage and None elsewhere.

        All ranks call it, with the same number of batches.
        """


@dataclass(frozen=True, kw_only=True)
class RankTask:
    """A task that one rank has opened."""

    dataset: StepDataset | None = None
    """Training steps; None on ranks that receive their samples."""
    validation: ValidationBatches | None = None
    """Validation batches; None on ranks that receive them."""
    sources: Mapping[str, SourceSamples] = field(default_factory=dict)
    """Samples of every source that this rank reads, by its name in the configuration; ranks compare them."""
    files: Mapping[str, str | None] = field(default_factory=dict)
    """Further files that all ranks must have alike, by their keys in the configuration."""

    @classmethod
    def open(
        cls,
        config: RunConfig,
        share: RankShare,
        build_streams: Callable[[Split], Mapping[str, Stream]],
        pack: Pack,
        views: str = "model",
        **fields: Any,
    ) -> Self:
        """Opens the samples of a rank, if it reads any.

        Args:
            config: the run's configuration.
            share: what the rank reads.
            build_streams: opens the streams of a split, in the order of their rows in a batch.
            pack: makes a micro-batch of prepared samples.
            views: views of each image that a batch keeps (`config.prefetch.plan_prefetch`).
            fields: further fields of the class.

        Raises:
            ConfigError: for files that cannot be read, fewer samples than ranks, or steps above `data.prefetch_gib`.
        """
        if not share.reads:
            return cls(**fields)
        check_validation_apart(config.data)
        rank, size = share.data_parallel_rank, share.data_parallel_size
        prefetch = plan_prefetch(config, size, views)
        dataset = StepDataset(config, build_streams("train"), pack, rank, size, prefetch)
        validation = build_validation_batches(config, build_streams("validation"), pack, rank, size)
        sources = dataset.sources() | name_sources("validation", validation.streams, config.data)
        return cls(dataset=dataset, validation=validation, sources=sources, **fields)

    def to(self, device: torch.device) -> None:
        """Moves to the device what the task keeps there, such as a frozen network."""

    def prepare(self, batch: PackedBatch, device: torch.device) -> PackedBatch:
        """Returns a micro-batch on the device, with all targets that the head needs."""
        return batch.to(device)

    def baselines(self, evaluator: Evaluator) -> dict[str, float]:
        """Returns what a predictor that ignores its input would reach, by term; all ranks call it."""
        return {}

    def write_pages(self, evaluator: Evaluator, folder: Path) -> dict[str, str]:
        """Writes pages to look at; all ranks call it.

        Returns:
            What the summary says of them, by name, on one rank of the last stage; elsewhere nothing.
        """
        return {}


@dataclass(frozen=True, kw_only=True)
class NoSettings:
    """The keys of the "task" section beside its name, for a task that has none."""


class Task(ABC):
    """A task as its configuration describes it.

    Attributes:
        config: the run's configuration.
        settings: the task's own keys of the "task" section, an instance of `Settings`.
    """

    Settings: ClassVar[type] = NoSettings
    """Dataclass of the task's own keys."""

    def __init__(self, config: RunConfig) -> None:
        """Checks what can be checked without files.

        Raises:
            ConfigError: for settings that cannot work.
        """
        self.config = config
        self.settings: Any = config.task.load(self.Settings)

    def describe(self) -> dict[str, Any]:
        """Returns the task's name and settings, defaults included, for checkpoints."""
        return {"name": self.config.task.name, **dataclasses.asdict(self.settings)}

    @property
    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The terms, in the order of every vector of sums and counts."""

    @abstractmethod
    def build_head(self, model: ModelConfig, tensor: TensorParallel) -> Head:
        """Builds the head, the last of the layers, without values; tensor-parallel ranks may divide it."""

    def build_model(self, tensor: TensorParallel | None = None, layers: Sequence[range] | None = None) -> TaskModel:
        """Builds the layers of one stage, without values.

        Args:
            tensor: the ranks that divide every layer; None is this process alone.
            layers: the model chunks of the stage; None is all layers.
        """
        training = self.config.training
        return TaskModel(
            self.build_head,
            self.config.model,
            tensor,
            layers,
            training.activation_checkpointing,
            training.kernels,
            fp32_residual_connection=training.fp32_residual_connection,
        )

    def head_flops(self, term_counts: Sequence[float]) -> float:
        """Returns operations of the head's forward pass for a batch with these counts; a multiply-add counts 2.

        A small head may leave it at 0.
        """
        return 0.0

    def expected_head_flops(self) -> float:
        """Returns operations of a whole step that the last stage adds to its layers, forward and backward.

        Those of the head, and of what is prepared for it on the device. A small head may leave it at 0.
        """
        return 0.0

    @abstractmethod
    def open(self, share: RankShare) -> RankTask:
        """Opens the files that a rank reads, before any process group exists.

        Raises:
            ConfigError: for a file that cannot be read or does not fit the configuration.
        """
