"""Defines what the trainer needs from a task, such as pretraining.

A task is one folder of `beit3_ds/tasks`, named by `"task": {"name": ...}` in the configuration file. A name with dots
is any importable module. The module has a class `TASK`, a subclass of `Task`. The trainer knows only terms and opaque
tensors:

    Task        built from the configuration alone, also by `beit3 check`: terms, model, costs
    RankTask    opened by one rank (`rank_task.py`): its samples, how it prepares a micro-batch, what it evaluates and
                writes

Around its steps a task may keep state of its own, such as a codebook: `RankTask.before_step`, `after_step` and
`figures`. Buffers of its model are saved in checkpoints. A task whose result is a file of its own writes it at the end
(`RankTask.write_results`) and recognises it before the next start (`Task.find_result`).

A task that needs more extends the following:

    several sequences per sample                    `Stream.sequences_per_sample`; `pack` puts them where they belong
    pooled rows                                     `PackedBatch.head_rows`; the head combines the rows that it reads
    captions that see only the words before them    `PackedBatch.causal_captions`
    another attention mask                          a field of `PackedBatch` that `model/attention.py` passes to the op
    no text, no image, another image size           `model` in the configuration; the streams that the task opens;
                                                    `Task.inputs` if batches hold other kinds than the streams
    files of its own                                `Task.formats`; `build_streams` opens the sources of these formats
    metrics that are means                          a term of weight 0, whose sum and count merge exactly over ranks
    metrics over all samples of a split             `RankTask.open(validation_loss=False)` and `RankTask.evaluate`
    other learning rates, frozen parts, an EMA      `training/optimizer.py`, by parameter names from the task
    terms that compare the samples of a whole step  `Task.step_loss`; the head returns `StepFeatures`
"""

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from beit3_ds.batch import PackedBatch
from beit3_ds.config import INPUT_KINDS, ConfigError, InputKind, ModelConfig, RunConfig
from beit3_ds.config.data import IMAGE_FORMATS
from beit3_ds.model import Head, StageModel, StepLoss, TaskModel
from beit3_ds.model.flops import layer_flops, work_of
from beit3_ds.parallel import TensorParallel
from beit3_ds.tasks.rank_task import RankShare, RankTask


class Term(NamedTuple):
    """Describes a loss term or a metric: a sum over samples or positions, divided by their count in the whole step."""

    name: str
    """Name in logs, metrics and messages."""
    stream: str
    """Stream whose samples it is computed on."""
    title: str
    """Readable name, used as the title of plots."""
    weight: float = 1.0
    """Weight in the loss; 0 for a metric."""
    unit: str = "cross entropy (nats)"
    """Unit, shown in plots."""


class Headline(NamedTuple):
    """Names the metric by which a task compares checkpoints."""

    name: str
    """Key of the metric in the result of `RankTask.evaluate` and in the run's validation records."""
    is_higher_better: bool = True
    """Whether a larger value is better."""


@dataclass(frozen=True, kw_only=True)
class NoSettings:
    """Holds no settings, for a task that has no keys except `name` in the "task" section."""


class Task(ABC):
    """Defines a task; it is built from the configuration alone.

    Attributes:
        config: configuration of the run.
        settings: the task's own keys in the "task" section, an instance of `Settings`.
        weights_description: result of `describe` of the task whose head the run starts from or evaluates; None if
            there is none (`adopt_weights`).
        weights_name: name of these weights, for messages.
    """

    Settings: ClassVar[type] = NoSettings
    """Dataclass of the task's own keys in the "task" section."""
    has_backbone: ClassVar[bool] = True
    """Whether the task trains BEiT-3, which the section "model" describes."""
    predicts_words: ClassVar[bool] = False
    """Whether the task's head has a matrix over the vocabulary, which `model.tie_word_embeddings` can share."""
    layout_fault: ClassVar[str] = ""
    """Reason why the task supports data parallelism alone; empty if it also supports tensor and pipeline
    parallelism."""
    pairs_per_sample: ClassVar[int] = 1
    """Pairs as which a sample of the stream of pairs is packed; memory and traffic are modelled with them."""
    formats: ClassVar[Mapping[str, Sequence[str]]] = {"images": IMAGE_FORMATS, "pairs": IMAGE_FORMATS, "texts": ()}
    """Formats of the sources that each stream takes; a stream without an entry takes no sources. A source without a
    format is allowed where the stream takes some of `IMAGE_FORMATS`, and for texts with an empty entry."""
    headline: ClassVar[Headline | None] = None
    """Metric of `RankTask.evaluate` by which checkpoints are compared; None for a task without metrics of its own."""

    def __init__(self, config: RunConfig) -> None:
        """Loads the settings and makes all checks that need no files.

        Raises:
            ConfigError: if the settings are invalid, the task does not support the layout or the format of a
                source, the model does not take the task's inputs, or the word table is tied to no head.
        """
        _check_formats(config, self.formats)
        self.config = config
        self.settings: Any = config.task.load(self.Settings)
        self.weights_description: Mapping[str, Any] | None = None
        self.weights_name = "the weights"
        parallel = config.parallel
        if self.layout_fault and parallel.model_parallel_size > 1:
            raise ConfigError(
                f"parallel: the task {config.task.name} supports neither tensor_parallel_size="
                f"{parallel.tensor_parallel_size} nor pipeline_parallel_size={parallel.pipeline_parallel_size}: "
                f"{self.layout_fault} Set both to 1; every ZeRO stage works."
            )
        if self.has_backbone and config.model.has_tied_table and not self.predicts_words:
            raise ConfigError(
                f"model.tie_word_embeddings=true, but the task {config.task.name} has no head that predicts words. Set "
                "it to false; weights with a tied table still fit `training.init_from`."
            )
        known = config.model.inputs if self.has_backbone else INPUT_KINDS
        if missing := [kind for kind in self.inputs if kind not in known]:
            raise ConfigError(
                f"model.inputs={json.dumps(known)}, but {config.task.name} has batches of "
                f"{' and '.join(missing)}. Add {json.dumps(missing)} to model.inputs."
            )

    @property
    def inputs(self) -> tuple[InputKind, ...]:
        """Returns the kinds of input in the task's batches; by default the streams that the run uses.

        It is read before the task's own constructor continues, so it may depend on `config` and `settings` alone.
        """
        streams = self.config.data.streams()
        return tuple(kind for kind in INPUT_KINDS if streams[kind].is_used)

    def describe(self) -> dict[str, Any]:
        """Returns the task's name and settings, defaults included, for checkpoints."""
        return {"name": self.config.task.name, **dataclasses.asdict(self.settings)}

    def describe_model(self) -> dict[str, Any]:
        """Returns the settings that a run must share with a checkpoint from which it resumes.

        Fields in `config.FIELDS_WITHOUT_TENSORS` may differ.
        """
        return dataclasses.asdict(self.config.model)

    def describe_architecture(self) -> str:
        """Returns the sizes of the model in a few words."""
        model = self.config.model
        return (
            f"{model.num_layers} x {model.hidden_size} ({model.layout}), "
            f"{model.grid_size} x {model.grid_size} patches, text up to {model.max_text_length}"
        )

    def adopt_weights(self, described: Mapping[str, Any] | None, where: str) -> None:
        """Stores the description of the weights that the run starts from or evaluates; called before `open`.

        A task whose weights need more than tensors, such as a list of answers, reads it from the description.

        Args:
            described: result of `describe` of the task that made the weights' head; None if unknown.
            where: name of the weights, for messages.
        """
        self.weights_description, self.weights_name = described, where

    def find_result(self) -> str | None:
        """Describes the finished result of this run in a line; returns None if the run must still be done.

        A task without a result of its own returns None.

        Raises:
            ConfigError: if there is a result of other settings, which the run would overwrite.
        """
        return None

    @property
    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """Returns the terms of the task, in the order of all vectors of sums and counts."""

    @abstractmethod
    def build_head(self, model: ModelConfig, tensor: TensorParallel) -> Head:
        """Builds the head with uninitialised parameters, which may be split over the tensor-parallel group."""

    def build_model(self, tensor: TensorParallel | None = None, layers: Sequence[range] | None = None) -> StageModel:
        """Builds the layers of one stage, with uninitialised parameters.

        Args:
            tensor: the tensor-parallel group; None is a group of this process alone.
            layers: model chunks of the stage; None is all layers.
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

    def training_flops(self, batch: PackedBatch) -> float:
        """Returns the operations of one micro-batch's forward and backward (3 x forward); a multiply-add counts 2.

        Counts matrix products only: no recomputation, no padding, no optimizer and no frozen network.
        """
        return 3 * sum(layer_flops(self.config.model, work_of(batch, self.head_flops(batch.term_counts))))

    @property
    def step_loss(self) -> StepLoss | None:
        """Returns the function that computes the terms from the features of a whole step; None if each sample has its
        own.

        With it the head returns `StepFeatures`, and a step of several micro-batches runs forward twice
        (`pipeline.coupled_step`). The function computes the same on all ranks and reads no parameters.
        """
        return None

    def head_flops(self, term_counts: Sequence[float]) -> float:
        """Returns the operations of the head's forward pass, given a count per term; a multiply-add counts 2.

        A task with a small head may keep the default of 0.
        """
        return 0.0

    def expected_head_flops(self) -> float:
        """Returns the operations per step of the head and of its targets on the device, forward and backward.

        A task with a small head may keep the default of 0.
        """
        return 0.0

    @abstractmethod
    def open(self, share: RankShare) -> RankTask:
        """Opens the files that a rank reads; called before any process group exists.

        Raises:
            ConfigError: if a file cannot be read or does not fit the configuration.
        """


def _check_formats(config: RunConfig, formats: Mapping[str, Sequence[str]]) -> None:
    """Refuses sources whose stream or format the task does not take.

    Raises:
        ConfigError: with the formats that it takes.
    """
    taken = {name: [*stream, *_implied_format(name, stream)] for name, stream in formats.items()}
    for name, stream in config.data.streams().items():
        for source in stream.sources:
            if source.format in taken.get(name, ()):
                continue
            known = "; ".join(f"{of}: {', '.join(map(str, listed))}" for of, listed in taken.items())
            raise ConfigError(
                f"data.{name}: the task {config.task.name} does not take source '{source.path}' of format "
                f"{source.format}. It takes {known.replace('None', 'none')}."
            )


def _implied_format(name: str, formats: Sequence[str]) -> tuple[None, ...]:
    is_implied = not formats if name == "texts" else bool(set(formats) & set(IMAGE_FORMATS))
    return (None,) if is_implied else ()
