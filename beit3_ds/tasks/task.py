"""Defines the interface between the trainer and a task, such as pretraining.

A task is one folder of `beit3_ds/tasks`. `"task": {"name": ...}` in the configuration file names the folder. A name
with dots names any importable module instead. The folder's `__init__.py` or the named module defines `TASK`, a subclass
of `Task`. The trainer uses a task through two classes:

    Task        built from the configuration alone, also by `beit3 check`: loss terms, model, costs
    RankTask    opened by each rank (`rank_task.py`): samples, preparation of micro-batches, evaluation, result files

A task may keep state of its own, such as a codebook. `RankTask.before_step` and `after_step` update the state, and
`RankTask.figures` reports values about it. The state must be in buffers of the task's model, because checkpoints
contain these buffers. A task may write a result file at the end of a run (`RankTask.write_results`). When the run is
started again, `Task.find_result` finds the file.

For further needs, a task uses the following:

    several sequences per sample                    `Stream.sequences_per_sample`; `pack` orders the sequences
    pooled rows                                     `PackedBatch.head_rows` selects the rows that the head reads
    causal attention within captions                `PackedBatch.causal_captions`
    another attention mask                          a field of `PackedBatch` that `model/attention.py` passes to the op
    another image size                              `model.image_size` in the configuration
    no text, or no image                            `model.inputs` in the configuration
    pairs whose image and text are separate inputs  `Task.inputs` names the kinds of input in batches
    files of its own                                `Task.formats`; `build_streams` opens the sources of these formats
    metrics that are means                          a term of weight 0, whose sum and count merge exactly over ranks
    metrics over all samples of a split             `Task.has_validation_loss = False` and `RankTask.evaluate`
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
from beit3_ds.config.data import IMAGE_FORMATS, Split
from beit3_ds.config.prefetch import ImageViews
from beit3_ds.model import Head, StageModel, StepLoss, TaskModel
from beit3_ds.model.flops import layer_flops, work_of
from beit3_ds.parallel import TensorParallel
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks.rank_task import RankShare, RankTask


class Term(NamedTuple):
    """Describes a loss term or a metric. Its value is a mean over the samples or positions of a training step or of the
    validation data.
    """

    name: str
    """Name of the term in logs, metrics and messages."""
    stream: str
    """Kind of samples from which the term is computed: "images", "pairs" or "texts"."""
    title: str
    """Readable name, used as the title of plots."""
    weight: float = 1.0
    """Weight of the term in the loss; 0 for a metric."""
    unit: str = "cross entropy (nats)"
    """Unit of the term, shown in plots."""


class Headline(NamedTuple):
    """Names the metric for comparing checkpoints of a task."""

    name: str
    """Key of the metric in the result of `RankTask.evaluate` and in the validation records of the run."""
    is_higher_better: bool = True
    """True if a larger value is better, False if a smaller value is better."""


@dataclass(frozen=True, kw_only=True)
class NoSettings:
    """Defines an empty settings class for tasks without keys of their own in the "task" section."""


class Task(ABC):
    """Defines the loss terms, the model and the costs of a task, from the configuration alone.

    Attributes:
        config: configuration of the run.
        settings: the task's own keys in the "task" section, an instance of `Settings`.
        weights_description: settings of the task that trained the loaded weights (`adopt_weights`); None if unknown.
        weights_name: name of the loaded weights, for messages.
    """

    Settings: ClassVar[type] = NoSettings
    """Dataclass of the task's own keys in the "task" section."""
    has_backbone: ClassVar[bool] = True
    """Whether the task trains the BEiT-3 model of the "model" section."""
    predicts_words: ClassVar[bool] = False
    """Whether the head predicts words. Only such a head can share the word embedding matrix
    (`model.tie_word_embeddings`)."""
    layout_fault: ClassVar[str] = ""
    """Reason why the task supports data parallelism only; empty if tensor and pipeline parallelism are supported too.
    """
    has_validation_loss: ClassVar[bool] = True
    """Whether a run computes the mean of each loss term over a few validation samples. If False, `RankTask.evaluate`
    computes metrics over all samples of a split instead."""
    pairs_per_sample: ClassVar[int] = 1
    """Number of image-text pairs per sample of `data.pairs`, for estimates of memory and traffic."""
    causal_captions: ClassVar[bool] = False
    """Whether each word of a caption attends only to the image, to earlier words and to itself
    (`PackedBatch.causal_captions`)."""
    formats: ClassVar[Mapping[str, Sequence[str]]] = {"images": IMAGE_FORMATS, "pairs": IMAGE_FORMATS, "texts": ()}
    """Formats that the task accepts for sources of each kind: "images", "pairs" and "texts". A kind that is not a key
    accepts no sources. If the task accepts any of `IMAGE_FORMATS` for images or for pairs, a source of this kind may
    omit its format. If the list for "texts" is empty, sources of texts must omit the format."""
    headline: ClassVar[Headline | None] = None
    """Metric for comparing checkpoints, one of the metrics that `RankTask.evaluate` returns; None for a task without
    metrics."""

    def __init__(self, config: RunConfig) -> None:
        """Loads the settings and checks everything that needs no files.

        Raises:
            ConfigError: if the settings are invalid, if the task does not support the layout of ranks, if it does not
                accept a source's format, if `model.inputs` lacks one of the task's `inputs`, or if word embeddings are
                tied but the head predicts no words.
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
        if self.has_backbone and config.model.has_tied_embedding and not self.predicts_words:
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
        """Returns the kinds of input ("images", "pairs", "texts") in the task's batches.

        By default, these are the kinds of samples in the section "data". `Task.__init__` reads this property before a
        subclass's constructor continues. An override may therefore use only `config` and `settings`.
        """
        streams = self.config.data.streams()
        return tuple(kind for kind in INPUT_KINDS if streams[kind].is_used)

    def image_views(self, *, embeds: bool, predicts: bool) -> ImageViews:
        """Returns which resized copies of each image a rank needs.

        By default, only ranks of the first pipeline stage need a copy, at the model's image size.

        Args:
            embeds: whether the rank needs the model's inputs (`RankShare.embeds`).
            predicts: whether the rank needs targets (`RankShare.predicts`).
        """
        return "model" if embeds else "neither"

    def describe(self) -> dict[str, Any]:
        """Returns the task's name and settings, including defaults, for storing in checkpoints."""
        return {"name": self.config.task.name, **dataclasses.asdict(self.settings)}

    def describe_model(self) -> dict[str, Any]:
        """Returns the model settings that a resumed run compares with the settings in the checkpoint.

        All settings must be equal, except the fields in `config.FIELDS_WITHOUT_TENSORS`.
        """
        return dataclasses.asdict(self.config.model)

    def describe_architecture(self) -> str:
        """Returns one line with the model's number of layers, hidden size, image patches and text length."""
        model = self.config.model
        return (
            f"{model.num_layers} x {model.hidden_size} ({model.layout}), "
            f"{model.grid_size} x {model.grid_size} patches, text up to {model.max_text_length}"
        )

    def adopt_weights(self, described: Mapping[str, Any] | None, where: str) -> None:
        """Stores the task description that was saved with the loaded weights; called before `open`.

        The description contains what a head needs besides tensors, such as a list of answers.

        Args:
            described: result of `describe` in the run that trained the weights; None if unknown.
            where: name of the weights, for messages.
        """
        self.weights_description, self.weights_name = described, where

    def find_result(self) -> str | None:
        """Returns one line about the result file of an earlier run with equal settings; None if there is no such file.

        With a result file, the run need not be repeated. A task without result files always returns None.

        Raises:
            ConfigError: if the result file was written with other settings, because the run would overwrite the file.
        """
        return None

    @property
    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """Returns the loss terms and metrics of the task, in the order of `PackedBatch.term_counts`."""

    @abstractmethod
    def build_head(self, model: ModelConfig, tensor: TensorParallel) -> Head:
        """Builds the head with uninitialised parameters; a head may split its parameters over the tensor-parallel
        group.
        """

    def build_model(self, tensor: TensorParallel | None = None, layers: Sequence[range] | None = None) -> StageModel:
        """Builds the layers of one pipeline stage, with uninitialised parameters.

        Args:
            tensor: the tensor-parallel group; None for a group of this process alone.
            layers: one range of layer numbers per model chunk of the stage; None for all layers.
        """
        training = self.config.training
        return TaskModel(
            self.build_head,
            self.config.model,
            tensor,
            layers,
            training.activation_checkpointing,
            fp32_residual_connection=training.fp32_residual_connection,
        )

    def training_flops(self, batch: PackedBatch) -> float:
        """Returns the floating-point operations of one micro-batch, forward and backward; backward counts as 2 x
        forward.

        A multiply-add counts as 2. Only matrix products of the trained model count. Recomputation, padding, the
        optimizer and frozen networks do not count.
        """
        model = self.config.model
        return 3 * sum(layer_flops(model, work_of(batch, self.head_flops(batch.term_counts), model.window_size)))

    @property
    def step_loss(self) -> StepLoss | None:
        """Returns a function that computes the loss terms from the features of all samples of a training step, or None.

        With None, the model's head computes the loss terms of each micro-batch separately. If this method returns a
        function, the head must return `StepFeatures` instead of loss terms, and a step of several micro-batches runs
        forward twice (`pipeline.coupled_step`). The function must return equal values on all ranks and must not read
        parameters.
        """
        return None

    def head_flops(self, term_counts: Sequence[float]) -> float:
        """Returns the floating-point operations of the head's forward pass; a multiply-add counts as 2.

        The default is 0, for tasks with a small head.

        Args:
            term_counts: number of samples or positions of each term, in the order of `terms`.
        """
        return 0.0

    def expected_head_flops(self) -> float:
        """Returns the floating-point operations of the head per step, forward and backward.

        If the task computes targets on the device, the operations for the targets are added. The default is 0, for
        tasks with a small head.
        """
        return 0.0

    def head_memory(self, num_images: int, element_size: int) -> int | None:
        """Returns the bytes of head activations that autograd keeps per micro-batch, for `beit3 check`.

        This default implementation returns None. `beit3 check` then uses the memory of pretraining's heads as an upper
        bound.

        Args:
            num_images: number of images in the micro-batch; the images have the model's image size.
            element_size: bytes per element of an activation.
        """
        return None

    def score_results(self, paths: Sequence[str], split: Split, folder: ResultFolder) -> dict[str, float]:
        """Scores a split's result files, writes tables, and returns the metrics by name. No model is needed.

        By default, a task cannot score result files, and this method always raises an error.

        Args:
            paths: result files, or folders of them, in the format that an evaluation of the task writes.
            split: split with the annotations.
            folder: folder of the tables.

        Raises:
            ConfigError: if a result is invalid or belongs to other samples, or the task cannot score result files.
        """
        raise ConfigError(
            f"--results: the task {self.config.task.name} scores no result files. Tasks that do: detection, "
            "segmentation. Evaluate weights (--weights)."
        )

    @abstractmethod
    def open(self, share: RankShare) -> RankTask:
        """Opens the files that a rank reads; called before any process group exists.

        Raises:
            ConfigError: if a file cannot be read or does not fit the configuration.
        """


def _check_formats(config: RunConfig, formats: Mapping[str, Sequence[str]]) -> None:
    """Checks that the task accepts the formats of all sources.

    Raises:
        ConfigError: if the task does not accept a source; the message lists the accepted formats.
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
