"""Defines what a task does on one rank: opens samples, updates its state at each step, evaluates, writes results."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self

import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.config import RunConfig
from beit3_ds.config.data import Split
from beit3_ds.config.prefetch import plan_prefetch
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
    """Describes which samples a rank reads, and what its pipeline stage needs of them."""

    data_parallel_rank: int
    """Rank in the data-parallel group, whose ranks read different samples."""
    data_parallel_size: int
    """Number of ranks of the data-parallel group."""
    embeds: bool
    """Whether the rank needs the model's inputs; true on the first stage of a pipeline."""
    predicts: bool
    """Whether the rank needs targets; true on the last stage of a pipeline."""
    reads: bool
    """Whether the rank reads samples itself; other ranks receive them from a rank that does (`Mesh.is_reader`)."""
    splits: tuple[Split, ...] = ("train", "validation")
    """Splits to open: the default for training, or the single split that `beit3 evaluate` scores."""

    @property
    def is_main(self) -> bool:
        """Returns whether the rank is the main one (`Mesh.is_main`), which writes the files of a run."""
        return self.reads and self.embeds and self.data_parallel_rank == 0


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
        """Returns this rank's batches for the validation loss, not yet prepared by `RankTask.prepare`."""

    def batches(self, split: Split) -> Iterable[PackedBatch]:
        """Returns this rank's share of all samples of a split as batches, not yet prepared by `RankTask.prepare`.

        Each iteration reads the samples again with worker processes. All ranks have the same number of batches, some of
        them empty. The data-parallel ranks together have each sample once. A sample's number in its stream
        (`SampleKey.index`) identifies it in `SampleResults`.
        """

    @property
    def model(self) -> StageModel:
        """Returns the layers of this stage; ZeRO-3 may have partitioned their parameters."""

    def predict(self, batches: Iterable[PackedBatch]) -> Iterator[tuple[PackedBatch, Any]]:
        """Yields each prepared batch, with the head's predictions on the last stage and None elsewhere.

        All ranks must call it with the same number of batches.
        """

    def trained_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the name and the value of each weight (in float32) and each buffer of the whole model, on the CPU.

        Reads the newest checkpoint without communication, so a single rank may call it.
        """


class Figures(NamedTuple):
    """Holds the figures that a task adds to a progress report."""

    values: Mapping[str, int | float] = {}
    """Values to add to the record in `metrics.jsonl`, by name; equal on all ranks."""
    lines: Sequence[str] = ()
    """Lines to print below the progress line."""


@dataclass(frozen=True, kw_only=True)
class RankTask:
    """Holds the opened samples and files of a task on one rank."""

    dataset: StepDataset | None = None
    """Dataset of training steps; None on ranks that receive their samples from another rank."""
    validation: ValidationBatches | None = None
    """Batches of the validation loss; None on ranks that receive them, and in a task without validation loss."""
    evaluation: Mapping[Split, EvaluationBatches] = field(default_factory=dict)
    """All samples of each split that the task evaluates; empty on ranks that receive them from another rank."""
    sources: Mapping[str, SourceSamples] = field(default_factory=dict)
    """Samples of each source that this rank reads, by the source's name in the configuration; all ranks compare them to
    detect different data."""
    files: Mapping[str, str | None] = field(default_factory=dict)
    """Paths of further files, by configuration key. Their contents must be the same on all ranks; so must the keys."""

    @classmethod
    def open(
        cls,
        config: RunConfig,
        share: RankShare,
        build_streams: Callable[[Split], Mapping[str, Stream]],
        pack: Pack,
        views: str = "model",
        validation_loss: bool = True,
        **fields: Any,
    ) -> Self:
        """Opens the samples of the splits in `share`; a rank that does not read samples opens none.

        The main rank prints a warning for each pair of splits that share images.

        Args:
            config: the run's configuration.
            share: the samples that the rank reads.
            build_streams: opens the streams of a split, in the order of their rows in a batch.
            pack: packs prepared samples into a micro-batch.
            views: views of each image that a batch keeps: "model", "tokenizer" or "both".
            validation_loss: whether an evaluation is the mean of the terms over at most `TrainingConfig.loss_samples`
                samples per stream, which stay in memory. False lets `evaluate` read all samples of a split.
            fields: values of the other fields of the class.

        Raises:
            ConfigError: if a file cannot be read, there are fewer samples than ranks, or a step exceeds
                `data.prefetch_gib`.
        """
        if not share.reads:
            return cls(**fields)
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
                dataset = StepDataset(config, streams, pack, rank, size, plan_prefetch(config, size, views))
            elif validation_loss:
                validation = build_validation_batches(config, streams, pack, rank, size)
            else:
                evaluation[split] = EvaluationBatches(config, streams, pack, rank, size)
        for line in describe_shared_images(samples) if share.is_main else ():
            print(line, flush=True)
        return cls(dataset=dataset, validation=validation, evaluation=evaluation, sources=sources, **fields)

    def start(self, mesh: Mesh, device: torch.device) -> None:
        """Moves the task's own tensors, such as those of a frozen network, to the device.

        Args:
            mesh: the ranks, over which the task may divide its own work.
            device: device of this rank.
        """

    def prepare(self, batch: PackedBatch, device: torch.device) -> PackedBatch:
        """Returns a micro-batch on the device, with all targets that the head needs."""
        return batch.to(device)

    def before_step(self, evaluator: Evaluator, step: int) -> None:
        """Prepares a training step, counted from 0; all ranks call it before each step.

        The call before step 0 precedes the evaluation at step 0. The preparation must depend only on the step and the
        state of the model, so that a resumed run repeats it exactly.
        """

    def resume(self, evaluator: Evaluator, done: int) -> None:
        """Restores the task's state that depends on the number of steps done; all ranks call it after loading.

        The result must be the state after `after_step` of step `done` - 1 and before `before_step` of step `done`. If a
        stop signal cancelled the evaluation between these two calls, it is repeated in this state.

        Args:
            evaluator: gives access to the model and its ranks.
            done: number of steps done.
        """

    def after_step(self, evaluator: Evaluator, *, is_skipped: bool) -> None:
        """Updates the task's own state after the optimizer's update of a training step; all ranks call it.

        Args:
            evaluator: gives access to the model and its ranks.
            is_skipped: whether the update was skipped, because a loss or gradient was not finite.
        """

    def figures(self) -> Figures:
        """Returns the task's figures for a progress report, counted since the last report; all ranks call it."""
        return Figures()

    def write_results(self, evaluator: Evaluator, folder: ResultFolder) -> dict[str, str]:
        """Writes the task's result files, which other runs may read; all ranks call it after the last checkpoint.

        Args:
            evaluator: gives access to the model and its ranks.
            folder: the run's output folder, for pages and pictures; a run does not fail if these cannot be written.

        Returns:
            Entries for the run's summary, by name; only the main rank's entries are shown.

        Raises:
            StorageError: if a file cannot be written. Starting the same command again writes it from the checkpoint.
        """
        return {}

    def evaluate(self, evaluator: Evaluator, split: Split, folder: ResultFolder | None) -> dict[str, float]:
        """Evaluates all samples of a split; all ranks must call it, even if the split has no samples.

        A task runs the model over `evaluator.batches(split)`, adds a row per sample to `SampleResults`, and computes
        its metrics on the main rank from the gathered rows.

        Args:
            evaluator: the model and its ranks.
            split: "validation" or "test".
            folder: folder for result files and pages, which only the main rank writes; None writes no files.

        Returns:
            Metrics by name on the main rank. Empty on other ranks, and for a split without annotations. A metric with
            the name of a term is used as that term's validation mean.
        """
        return {}

    def draw_sample(self, sample: Any) -> ShownSample | None:
        """Draws a prepared training sample as the model gets it; None in a task that draws none.

        Args:
            sample: what `prepare` of the task's samples returned.
        """
        return None

    def baselines(self, evaluator: Evaluator) -> dict[str, float]:
        """Returns the value of each term for a predictor that ignores its input, by name; all ranks must call it."""
        return {}

    def write_pages(self, evaluator: Evaluator, folder: ResultFolder) -> dict[str, str]:
        """Writes pages that show example results; all ranks must call it.

        Returns:
            Entries for the run's summary, by name, on one rank of the last pipeline stage; empty on other ranks.
        """
        return {}
