"""Implements training of the visual tokenizer with two loss terms (BEiT v2, section 2.2)."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch, StepBatch
from beit3_ds.config import ConfigError, RunConfig
from beit3_ds.config.prefetch import ImageViews
from beit3_ds.model import Head, StageModel
from beit3_ds.parallel import Mesh
from beit3_ds.pixels import to_floats
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks.rank_task import Evaluator, Figures, RankShare, RankTask
from beit3_ds.tasks.task import Task, Term
from beit3_ds.tasks.visual_tokenizer.code_usage import CodeCounter, measure_code_usage
from beit3_ds.tasks.visual_tokenizer.codebook import gather_vectors, mean_features, start_steps
from beit3_ds.tasks.visual_tokenizer.config import VisualTokenizerSettings
from beit3_ds.tasks.visual_tokenizer.model import TokenizerModel, forward_flops
from beit3_ds.tasks.visual_tokenizer.packing import pack, with_teacher_features
from beit3_ds.tasks.visual_tokenizer.results import write_tokenizer
from beit3_ds.tasks.visual_tokenizer.samples import build_streams
from beit3_ds.tokenizers import OrientedGradients, Teacher, build_teacher, load_visual_tokenizer
from beit3_ds.tokenizers.recipe import Recipe, check_can_be_written, describe_trained, is_trained, visual_recipe
from beit3_ds.tokenizers.teacher import describe_teacher

_SECTION = "tokenizers.visual"
_USAGE_IMAGES = 1024  # training images whose codes are counted at the end


@dataclass(frozen=True, kw_only=True)
class TokenizerRankTask(RankTask):
    """Trains the visual tokenizer on one rank; holds the teacher and the opened samples."""

    run_config: RunConfig
    """Configuration of the run."""
    continuous_steps: int
    """Number of initial steps without quantization."""
    teacher: Teacher
    """Network or image descriptor whose features the tokenizer learns to reconstruct."""
    teacher_description: str
    """Human-readable description of the teacher."""
    counter: CodeCounter
    """Counts the codes of all ranks since the last progress report."""

    def start(self, mesh: Mesh, device: torch.device) -> None:
        """Moves the teacher and the code counts to the device."""
        self.teacher.to(device)
        self.counter.to(device)

    def prepare(self, batch: PackedBatch, device: torch.device) -> PackedBatch:
        """Returns a micro-batch on the device, with float pixels and the teacher's features."""
        batch = batch.to(device)
        assert batch.pixels is not None, "every rank reads pixels"
        pixels = to_floats(batch.pixels, batch.colors)
        return with_teacher_features(dataclasses.replace(batch, pixels=pixels, colors=None), self._features(pixels))

    def before_step(self, evaluator: Evaluator, step: int) -> None:
        """Before step 0, computes the mean of the teacher's features. Before step `continuous_steps`, computes the
        codebook.

        Quantization begins at step `continuous_steps`.
        """
        model = _tokenizer(evaluator)
        model.is_quantized = step >= self.continuous_steps
        if step == 0:
            steps = list(self._read(start_steps(self.run_config, step)))
            model.center.copy_(mean_features(steps, self._features, evaluator.mesh, evaluator.device))
        if step == self.continuous_steps:
            steps = list(self._read(start_steps(self.run_config, step)))
            vectors = gather_vectors(steps, _vectors(evaluator, steps), evaluator.mesh)
            model.quantize.start(vectors.to(evaluator.device))

    def resume(self, evaluator: Evaluator, done: int) -> None:
        """Sets the model's `is_quantized` to the value of the last finished step."""
        _tokenizer(evaluator).is_quantized = done > self.continuous_steps

    def after_step(self, evaluator: Evaluator, *, is_skipped: bool) -> None:
        """Updates the codebook from the vectors of a whole step. The data-parallel ranks sum `Quantizer.totals`.

        The codebook stays unchanged after a skipped step, and before quantization begins.
        """
        model = _tokenizer(evaluator)
        quantizer = model.quantize
        if is_skipped or not model.is_quantized:
            quantizer.totals.zero_()
            return
        quantizer.totals.copy_(evaluator.mesh.sum_over_data(quantizer.totals))
        self.counter.add_counts(quantizer.totals[:, -1])
        quantizer.move_codes()

    def figures(self) -> Figures:
        """Returns the usage of codes since the last progress report, and resets the counts."""
        if not self.counter.has_codes:
            return Figures(lines=["codes: none yet, the decoder gets the encoder's vectors"])
        usage = self.counter.usage()
        self.counter.clear()
        warning = usage.describe_if_low()
        lines = [f"codes: {usage}", *([f"WARNING: {warning}"] if warning else [])]
        return Figures({"codes_used": usage.num_codes, "code_perplexity": round(usage.perplexity)}, lines)

    def write_results(self, evaluator: Evaluator, folder: ResultFolder) -> dict[str, str]:
        """Writes the tokenizer, its recipe (training settings) and a picture of its codes.

        Returns:
            Entries for the run's summary, by name: the written files, and the usage of codes on training images. Empty
            on all ranks except the main rank.
        """
        visual, total_steps = self.run_config.tokenizers.visual, self.run_config.training.total_steps
        num_steps = -(-_USAGE_IMAGES // self.run_config.data.images.samples_per_step)
        steps = self._read(range(total_steps, total_steps + num_steps))
        nearest = _tokenizer(evaluator).quantize.nearest
        codes = (nearest(vectors) for vectors in _vectors(evaluator, steps))
        usage = measure_code_usage(codes, visual.codebook_size, evaluator.mesh)
        warning = usage.describe_if_low()
        if not evaluator.mesh.is_main:
            return {}
        # The tokenizer is written last, because a run counts as finished once the tokenizer exists.
        tensors = dict(evaluator.trained_tensors())
        results = write_tokenizer(self.run_config, self.teacher_description, tensors, folder)
        return results | {"codes": f"{usage} over training images"} | ({"warning": warning} if warning else {})

    def _features(self, pixels: Tensor) -> Tensor:
        if not len(pixels):  # some networks do not accept an empty batch
            return pixels.new_empty(0, self.run_config.tokenizers.visual.grid_size**2, self.teacher.width)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.run_config.options.is_bf16):
            return self.teacher(pixels)

    def _read(self, steps: range) -> Iterator[StepBatch]:
        """Yields this rank's samples of some steps; broken records are left out."""
        assert self.dataset is not None, "every rank reads"
        yield from map(self.dataset.prepare, steps)


class VisualTokenizerTask(Task):
    """Defines the training of the visual tokenizer, which reconstructs a teacher's features from codes.

    Follows BEiT v2 (Peng et al., 2022, arXiv:2208.06366, section 2.2).
    """

    Settings = VisualTokenizerSettings
    settings: VisualTokenizerSettings
    has_backbone: ClassVar[bool] = False
    layout_fault: ClassVar[str] = (
        "a tokenizer of base size has 107M parameters, which fit on every device, and its layers are not split."
    )

    def __init__(self, config: RunConfig) -> None:
        """Checks that the configuration has all keys that this task needs, and only keys that the task supports.

        Raises:
            ConfigError: if a needed key is missing, if an unsupported key is present, or if `continuous_steps` is too
                large.
        """
        super().__init__(config)
        _check_sections(config)
        total_steps, continuous_steps = config.training.total_steps, self.settings.continuous_steps
        if continuous_steps >= total_steps:
            raise ConfigError(
                f"task.continuous_steps={continuous_steps} must be below training.total_steps={total_steps}: the "
                "codebook needs steps of its own."
            )
        self._teacher: Teacher | None = None

    def describe_model(self) -> dict[str, Any]:
        """Returns the settings that a resumed run must keep: all training settings except the image sources."""
        return {key: value for key, value in self._recipe().items() if key != "images.train"}

    def find_result(self) -> str | None:
        """Returns one line about the tokenizer's file if a run with equal settings wrote it; None if there is no file.

        Raises:
            ConfigError: if the file was trained with other settings, or is not a tokenizer.
        """
        path = self.config.tokenizers.visual.path
        if not is_trained(_SECTION, path, self._recipe(), lambda: _read_known(path)):
            return None
        return describe_trained(_SECTION, path)

    @property
    def terms(self) -> tuple[Term, ...]:
        """Returns the two loss terms: distance from the teacher's features, and commitment."""
        weight = self.settings.commitment_weight
        return (
            Term("feature_distance", "images", "reconstruction of the teacher's features", 1.0, "1 - cosine"),
            Term("commitment", "images", "commitment to the codes", weight, "squared distance"),
        )

    def build_head(self, model: Any, tensor: Any) -> Head:
        """Raises an AssertionError: this task has no head on BEiT-3. `build_model` builds the tokenizer."""
        raise AssertionError("the visual tokenizer has no head on BEiT-3")

    def build_model(self, tensor: Any = None, layers: Any = None) -> StageModel:
        """Builds the tokenizer's networks.

        On the meta device, which planning uses, this method loads no teacher. It then assumes that a pretrained teacher
        that is not loaded yet has `hidden_size` features, like the tokenizer.
        """
        visual = self.config.tokenizers.visual
        is_planned = torch.get_default_device().type == "meta" and self._teacher is None
        width = _planned_width(self.settings, self.config) if is_planned else self._load_teacher().width
        model = TokenizerModel(visual, width, describe_teacher(self.settings))
        if self.config.training.activation_checkpointing == "full":
            model.recompute_blocks()
        return model

    def training_flops(self, batch: PackedBatch) -> float:
        """Returns the floating-point operations of encoder and decoder per micro-batch, forward and backward.

        Backward counts as 2 x forward, and a multiply-add counts as 2.
        """
        width = _planned_width(self.settings, self.config) if self._teacher is None else self._teacher.width
        return 3 * forward_flops(self.config.tokenizers.visual, width, batch.num_images)

    def describe_architecture(self) -> str:
        """Returns one line with the tokenizer's sizes: blocks, hidden size, image patches and codes."""
        visual = self.config.tokenizers.visual
        return (
            f"visual tokenizer, {visual.num_layers} + {visual.decoder_layers} blocks x {visual.hidden_size}, "
            f"{visual.grid_size} x {visual.grid_size} patches, {visual.codebook_size} codes of {visual.codebook_dim}"
        )

    def image_views(self, *, embeds: bool, predicts: bool) -> ImageViews:
        """Returns "tokenizer": images have the visual tokenizer's size."""
        return "tokenizer"

    def open(self, share: RankShare) -> TokenizerRankTask:
        """Opens the teacher and the images that a rank reads, and checks that the tokenizer's file can be written.

        Raises:
            ConfigError: if a file cannot be read, or the tokenizer's file cannot be written.
        """
        config, visual = self.config, self.config.tokenizers.visual
        check_can_be_written(_SECTION, visual.path)
        _check_no_old_training(visual.path)
        return TokenizerRankTask.open(
            self,
            share,
            functools.partial(build_streams, config),
            functools.partial(pack, visual=visual),
            files={"task.teacher_weights": self.settings.teacher_weights},
            run_config=config,
            continuous_steps=self.settings.continuous_steps,
            teacher=self._load_teacher(),
            teacher_description=describe_teacher(self.settings),
            counter=CodeCounter(visual.codebook_size),
        )

    def _load_teacher(self) -> Teacher:
        if self._teacher is None:
            self._teacher = build_teacher(self.settings, self.config.tokenizers.visual)
        return self._teacher

    def _recipe(self) -> Recipe:
        return visual_recipe(self.config, dataclasses.asdict(self.settings))


TASK = VisualTokenizerTask


def _check_sections(config: RunConfig) -> None:
    training = config.training
    if not config.tokenizers.visual.path:
        raise ConfigError("tokenizers.visual.path is missing: name the file that the run writes.")
    if config.backbone is not None:
        raise ConfigError("the section 'model' has no meaning for the task visual_tokenizer. Remove it.")
    if training.init_from is not None:
        raise ConfigError("training.init_from has no meaning for the task visual_tokenizer. Remove it.")


def _check_no_old_training(path: str) -> None:
    unfinished = Path(f"{path}.training.pt")
    if unfinished.exists():
        raise ConfigError(
            f"{unfinished} is an unfinished training of version 0.1, which this version cannot resume. Finish it with "
            "version 0.1, or delete the file to train from the start."
        )


def _planned_width(settings: VisualTokenizerSettings, config: RunConfig) -> int:
    visual = config.tokenizers.visual
    is_local = settings.teacher == "oriented_gradients"
    return OrientedGradients(visual.patch_size).width if is_local else visual.hidden_size


def _read_known(path: str) -> Recipe:
    """Returns the training settings that a tokenizer's own file shows: image size, patch size and codebook size.

    Used for imported tokenizers, which have no separate file of training settings.
    """
    trained = load_visual_tokenizer(path).config
    return {name: getattr(trained, name) for name in ("image_size", "patch_size", "codebook_size")}


def _tokenizer(evaluator: Evaluator) -> TokenizerModel:
    model = evaluator.model
    assert isinstance(model, TokenizerModel), f"a {type(model).__name__} is no tokenizer"
    return model


def _vectors(evaluator: Evaluator, steps: Iterable[StepBatch]) -> Iterator[Tensor]:
    """Yields the encoder's vectors of each micro-batch, (images, patches, width), in evaluation mode.

    All ranks must call this function.
    """
    batches = (batch for step in steps for batch in step.micro_batches)
    for _, vectors in evaluator.predict(batches):
        yield vectors
