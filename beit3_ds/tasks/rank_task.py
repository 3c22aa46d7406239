"""Defines the work of a task on one rank: opening samples, updating state at each step, evaluating, writing results."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.config import RunConfig
from beit3_ds.config.data import Split
from beit3_ds.config.prefetch import ImageViews, plan_prefetch
from beit3_ds.data import EvaluationBatches, StepDataset, ValidationBatches, build_validation_batches
from beit3_ds.data.packing import Pack
from beit3_ds.data.samples import SourceSamples, Stream, name_sources
from beit3_ds.data.validation_overlap import check_validation_apart, describe_shared_images
from beit3_ds.model import StageModel
from beit3_ds.parallel import Mesh
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks.result_page import ShownSample


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """Describes which samples a rank reads, whether it needs model inputs, and whether it needs targets."""

    data_parallel_rank: int
    """Rank in the data-parallel group; ranks of this group read different samples."""
    data_parallel_size: int
    """Number of ranks of the data-parallel group."""
    embeds: bool
    """Whether the rank needs the model's inputs; true on the first pipeline stage."""
    predicts: bool
    """Whether the rank computes predictions and losses, and so needs targets; true on the last pipeline stage."""
    reads: bool
    """Whether the rank reads samples from files (`Mesh.is_reader`). Other ranks receive samples from a rank that reads.
    """
    splits: tuple[Split, ...] = ("train", "validation")
    """Splits to open: "train" and "validation" for training, or the single split that `beit3 evaluate` scores."""

    @property
    def is_main(self) -> bool:
        """Returns whether the rank is the main rank (`Mesh.is_main`), which writes the run's files."""
        return self.reads and self.embeds and self.data_parallel_rank == 0


class SampledTask(Protocol):
    """Describes a task's samples for `RankTask.open`; `Task` implements this protocol."""

    config: RunConfig
    has_validation_loss: ClassVar[bool]
    pairs_per_sample: ClassVar[int]

    def image_views(self, *, embeds: bool, predicts: bool) -> ImageViews:
        """Returns which resized copies of each image a rank needs."""


class Evaluator(Protocol):
    """Gives a task access to the model, during a run and at its end."""

    @property
    def mesh(self) -> Mesh:
        """Returns the mesh of all ranks."""

    @property
    def device(self) -> torch.device:
        """Returns the device of this rank."""

    @property
    def validation(self) -> Iterable[PackedBatch]:
        """Returns this rank's batches for the validation loss. `RankTask.prepare` has not been applied to these
        batches.
        """

    def batches(self, split: Split) -> Iterable[PackedBatch]:
        """Returns this rank's batches of a split; the batches of all data-parallel ranks together contain every
        evaluated sample once.

        `RankTask.prepare` has not been applied to the batches. All ranks get the same number of batches, so some may be
        empty. Each pass over the batches starts new worker processes and reads all samples again. `SampleResults`
        identifies a sample by its index in the split (`SampleKey.index`).
        """

    @property
    def model(self) -> StageModel:
        """Returns the layers of this rank's pipeline stage; ZeRO-3 may have partitioned the parameters."""

    def predict(self, batches: Iterable[PackedBatch]) -> Iterator[tuple[PackedBatch, Any]]:
        """Yields each batch after preparation, with the head's predictions; predictions are None except on the last
        stage.

        All ranks must call this method with the same number of batches.
        """

    def trained_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields names and values of trained tensors, on the CPU; weights are float32.

        During training, all weights and buffers are read from the newest checkpoint. In `beit3 evaluate`, the method
        yields the parameters of this pipeline stage, and no buffers. Does not communicate, so a single rank may call
        this method.
        """


class Figures(NamedTuple):
    """Holds values that a task adds to a progress report, such as the usage of codes."""

    values: Mapping[str, int | float] = {}
    """Values by name for the record in `metrics.jsonl`; equal on all ranks."""
    lines: Sequence[str] = ()
    """Lines to print below the progress line."""


@dataclass(frozen=True, kw_only=True)
class RankTask:
    """Defines the part of a task that runs on one rank; holds the opened samples and files."""

    dataset: StepDataset | None = None
    """Dataset of training steps; None on ranks that receive samples from another rank."""
    validation: ValidationBatches | None = None
    """Batches for the validation loss; None on ranks that receive batches from another rank, and in tasks without
    validation loss."""
    evaluation: Mapping[Split, EvaluationBatches] = field(default_factory=dict)
    """This rank's batches of all samples of each evaluated split; empty on ranks that receive samples from another
    rank."""
    sources: Mapping[str, SourceSamples] = field(default_factory=dict)
    """Opened samples of each source, by source name; empty on ranks that read no data. Ranks compare the files behind
    these samples, to detect that ranks see different data."""
    files: Mapping[str, str | None] = field(default_factory=dict)
    """Paths of files outside the data streams, such as a list of class names, by configuration key. A path is None if
    the run does not use the file. All ranks must have equal keys and files with equal contents."""

    @classmethod
    def open(
        cls,
        task: SampledTask,
        share: RankShare,
        build_streams: Callable[[Split], Mapping[str, Stream]],
        pack: Pack,
        **fields: Any,
    ) -> Self:
        """Opens the samples of the splits in `share`; opens none on a rank that does not read samples.

        If the task has a validation loss (`Task.has_validation_loss`), at most `TrainingConfig.loss_samples` validation
        samples per kind are opened, and stay in memory. Otherwise, all samples of splits other than "train" are opened,
        for `evaluate`. The main rank prints a warning for each pair of splits with common images.

        Args:
            task: the task.
            share: describes the samples that the rank reads.
            build_streams: opens the samples of a split, by kind ("images", "pairs" or "texts"). The order of the
                returned kinds is the order of their samples in a batch.
            pack: packs prepared samples into a micro-batch.
            fields: values of further fields of the class.

        Raises:
            ConfigError: if a file cannot be read, there are fewer samples than ranks, or the samples of a step need
                more memory than `data.prefetch_gib`.
        """
        if not share.reads:
            return cls(**fields)
        config = task.config
        check_validation_apart(config.data)
        rank, size = share.data_parallel_rank, share.data_parallel_size
        dataset, validation = None, None
        sources: dict[str, SourceSamples] = {}
        samples: dict[Split, list[SourceSamples]] = {}
        evaluation: dict[Split, EvaluationBatches] = {}
        for split in share.splits:
            streams = build_streams(split)
            sources |= name_sources(split, streams, config.data)
            samples[split] = [source for stream in streams.values() for source in stream.sources]
            if split == "train":
                views = task.image_views(embeds=share.embeds, predicts=share.predicts)
                prefetch = plan_prefetch(config, size, views, pairs_per_sample=task.pairs_per_sample)
                dataset = StepDataset(config, streams, pack, rank, size, prefetch)
            elif task.has_validation_loss:
                validation = build_validation_batches(config, streams, pack, rank, size)
            else:
                evaluation[split] = EvaluationBatches(config, streams, pack, rank, size)
        for line in describe_shared_images(samples) if share.is_main else ():
            print(line, flush=True)
        return cls(dataset=dataset, validation=validation, evaluation=evaluation, sources=sources, **fields)

    def start(self, mesh: Mesh, device: torch.device) -> None:
        """Moves the task's own tensors, such as a frozen network, to the device.

        Args:
            mesh: mesh of all ranks; the task may divide work over the ranks.
            device: device of this rank.
        """

    def prepare(self, batch: PackedBatch, device: torch.device) -> PackedBatch:
        """Returns a micro-batch on the device, with all targets for the head."""
        return batch.to(device)

    def before_step(self, evaluator: Evaluator, step: int) -> None:
        """Prepares a training step. All ranks call this method before each step.

        The call for step 0 comes before the evaluation at step 0. The preparation must depend only on the step number
        and the model's state. A resumed run then repeats the preparation exactly.

        Args:
            evaluator: gives access to the model and the ranks.
            step: number of the step, from 0.
        """

    def resume(self, evaluator: Evaluator, done: int) -> None:
        """Restores task state that depends on the number of finished steps.

        All ranks call this method after a checkpoint is loaded. The restored state must equal the state between
        `after_step` of step `done` - 1 and `before_step` of step `done`. A run may evaluate the model at this point. If
        a stop signal cancelled the evaluation, the resumed run repeats it with the restored state.

        Args:
            evaluator: gives access to the model and the ranks.
            done: number of finished steps.
        """

    def after_step(self, evaluator: Evaluator, *, is_skipped: bool) -> None:
        """Updates the task's own state after the optimizer step. All ranks call this method.

        Args:
            evaluator: gives access to the model and the ranks.
            is_skipped: whether the optimizer skipped the update because a loss or gradient was not finite.
        """

    def figures(self) -> Figures:
        """Returns the task's own values and lines for the next progress report. All ranks call this method."""
        return Figures()

    def write_results(self, evaluator: Evaluator, folder: ResultFolder) -> dict[str, str]:
        """Writes result files that other runs may read. All ranks call this method after the last checkpoint.

        Args:
            evaluator: gives access to the model and the ranks.
            folder: the run's output folder, for pages and pictures. If a page or picture cannot be written, the run
                continues.

        Returns:
            Entries for the run's summary, by name; only the main rank's entries are shown.

        Raises:
            StorageError: if a result file cannot be written. When the run's command is started again, it writes the
                file from the last checkpoint.
        """
        return {}

    def evaluate(self, evaluator: Evaluator, split: Split, folder: ResultFolder | None) -> dict[str, float]:
        """Evaluates all samples of a split. All ranks must call this method, even if the split has no samples.

        A task runs the model over `evaluator.batches(split)` and adds one row per sample to `SampleResults`. The main
        rank computes the metrics from the gathered rows.

        Args:
            evaluator: gives access to the model and the ranks.
            split: "validation" or "test".
            folder: folder for result files and pages, which only the main rank writes. With None, no files are written.

        Returns:
            On the main rank, the metrics by name. Empty on other ranks; also empty for a split without annotations. In
            training, the means of the loss terms over the validation samples are recorded together with the metrics. A
            metric that has the name of a loss term replaces the mean of this term.
        """
        return {}

    def draw_sample(self, sample: Any) -> ShownSample | None:
        """Makes a picture of a training sample, as the model sees the sample; returns None if the task makes none.

        Args:
            sample: result of the `prepare` method of the task's samples.
        """
        return None

    def baselines(self, evaluator: Evaluator) -> dict[str, float]:
        """Returns the loss of the best predictor that ignores the input, by name of the loss term.

        Returns an empty dict if the task does not compute these losses. All ranks must call this method.
        """
        return {}

    def write_pages(self, evaluator: Evaluator, folder: ResultFolder) -> dict[str, str]:
        """Writes pages with example results. All ranks must call this method.

        Returns:
            Entries for the run's summary, by name, from one rank of the last pipeline stage; empty on other ranks.
        """
        return {}
