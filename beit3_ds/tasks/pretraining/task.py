"""Implements the pretraining task: masked data modeling with four loss terms (paper section 2.2)."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ConfigError, ModelConfig, RunConfig
from beit3_ds.config.prefetch import ImageViews
from beit3_ds.parallel import Mesh, TensorParallel
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks.pretraining.baselines import TERM_STREAMS, unigram_entropies
from beit3_ds.tasks.pretraining.config import PretrainingConfig
from beit3_ds.tasks.pretraining.encoding import CodeEncoder
from beit3_ds.tasks.pretraining.heads import MaskedModelingHeads, head_flops
from beit3_ds.tasks.pretraining.packing import image_shape, pack
from beit3_ds.tasks.pretraining.predictions import write_predictions
from beit3_ds.tasks.pretraining.samples import build_streams
from beit3_ds.tasks.pretraining.targets import prepare_batch
from beit3_ds.tasks.rank_task import Evaluator, RankShare, RankTask
from beit3_ds.tasks.task import Task, Term
from beit3_ds.tokenizers import TextTokenizer, check_visual_tokenizer_fits, load_visual_tokenizer
from beit3_ds.tokenizers.text import load_text_tokenizer


@dataclass(frozen=True, kw_only=True)
class PretrainingRankTask(RankTask):
    """Runs pretraining on one rank; holds the tokenizers and the opened samples."""

    model: ModelConfig
    """Model configuration with the vocabulary sizes."""
    validation_sources: Mapping[str, Sequence[str]]
    """Short names of the validation sources, by kind of samples ("images", "pairs" or "texts")."""
    text_tokenizer: TextTokenizer | None
    """Text tokenizer; None in a run that has neither texts nor pairs."""
    encoder: CodeEncoder | None
    """Encodes images as visual codes; None on pipeline stages without heads, and in a run on texts only."""

    def start(self, mesh: Mesh, device: torch.device) -> None:
        """Moves the visual tokenizer to the device, and sets the tensor-parallel group whose ranks each encode a part
        of the images.
        """
        if self.encoder is not None:
            self.encoder.start(mesh.tensor, device)

    def prepare(self, batch: PackedBatch, device: torch.device) -> PackedBatch:
        """Moves a micro-batch to the device; pipeline stages with heads also add the codes of the masked patches."""
        return prepare_batch(batch, self.encoder.encode if self.encoder else None, device)

    def baselines(self, evaluator: Evaluator) -> dict[str, float]:
        """Returns the loss of the best predictor that ignores the input, by term name (`unigram_entropies`)."""
        return unigram_entropies(
            evaluator.validation,
            self.encoder.encode if self.encoder else None,
            self.model,
            evaluator.mesh,
            evaluator.device,
            self.validation_sources,
        )

    def write_pages(self, evaluator: Evaluator, folder: ResultFolder) -> dict[str, str]:
        """Writes `predictions.html`, which shows the model's guesses for masked words and patches of one validation
        batch.
        """
        pages = {}
        encode = None
        if self.encoder:
            pages["visual_tokenizer_teacher"] = self.encoder.tokenizer.teacher_description
            encode = self.encoder.encode_alone
        for batch, logits in evaluator.predict(itertools.islice(evaluator.validation, 1)):
            if logits is None or evaluator.mesh.data_parallel_rank or evaluator.mesh.tensor.rank:
                continue
            page = functools.partial(write_predictions, batch, logits, self.text_tokenizer, encode)
            if folder.write("predictions.html", page):
                pages["predictions"] = str(folder.path / "predictions.html")
        return pages


class Pretraining(Task):
    """Defines pretraining by masked data modeling of images, texts and image-text pairs (paper section 2.2)."""

    Settings = PretrainingConfig
    settings: PretrainingConfig
    predicts_words: ClassVar[bool] = True

    def __init__(self, config: RunConfig) -> None:
        """Checks the settings of the visual tokenizer and the weights of the loss terms.

        Raises:
            ConfigError: if a run with images or pairs has no visual tokenizer; if the tokenizer and the model differ in
                grid size or codebook size; or if every term with samples has weight 0.
        """
        super().__init__(config)
        if config.data.has_images:
            _check_visual_tokenizer(config)
        weights, streams = self.settings.loss_weights, config.data.streams()
        self._terms = tuple(
            Term(name, stream, _TITLES[name], getattr(weights, name)) for name, stream in TERM_STREAMS.items()
        )
        if not any(streams[term.stream].samples_per_step and term.weight for term in self._terms):
            raise ConfigError(
                "task.loss_weights: every term that has samples has weight 0; nothing would be trained. Give one "
                "of them a weight."
            )

    @property
    def terms(self) -> tuple[Term, ...]:
        """Returns the four loss terms: image patches, text tokens, pair patches, and caption tokens."""
        return self._terms

    def build_head(self, model: ModelConfig, tensor: TensorParallel) -> MaskedModelingHeads:
        """Builds the MIM head and the MLM head, with uninitialised parameters."""
        return MaskedModelingHeads(model, tensor)

    def head_flops(self, term_counts: Sequence[float]) -> float:
        """Returns the floating-point operations of a forward pass of the MIM and MLM heads; a multiply-add counts as 2.

        Args:
            term_counts: number of masked positions of each term, in the order of `terms`.
        """
        return head_flops(self.config.model, term_counts)

    def expected_head_flops(self) -> float:
        """Returns the floating-point operations of the heads (forward and backward) and the visual tokenizer per step.

        If the tokenizer computes in float32 and the model in bf16, one operation of the tokenizer counts as 9
        operations. According to a model of the H100, a float32 operation takes about 9 times as long as a bf16
        operation.
        """
        data, num_patches = self.config.data, self.config.model.num_patches
        images, pairs, texts = (stream.samples_per_step for stream in data.streams().values())
        ratios = self.settings
        masked_tokens = pairs * data.pair_text_length * ratios.pair_text_mask_ratio
        masked_tokens += texts * data.text_length * ratios.text_mask_ratio
        patches = (images + pairs) * num_patches * ratios.image_mask_ratio
        return 3 * self.head_flops((patches, masked_tokens, 0, 0)) + self._tokenizer_flops()

    def image_views(self, *, embeds: bool, predicts: bool) -> ImageViews:
        """Returns which resized copies of each image a rank needs. The visual tokenizer's copy is for the targets."""
        if not predicts:
            return "model"
        return "both" if embeds else "tokenizer"

    def open(self, share: RankShare) -> PretrainingRankTask:
        """Opens the tokenizers and the samples that a rank reads.

        Raises:
            ConfigError: if a file cannot be read or does not fit the model.
        """
        config = self.config
        text_tokenizer = load_text_tokenizer(config)
        encoder: CodeEncoder | None = None
        if share.predicts and config.data.has_images:
            visual_tokenizer = load_visual_tokenizer(config.tokenizers.visual.path)
            check_visual_tokenizer_fits(visual_tokenizer, config)
            encoder = CodeEncoder(visual_tokenizer, getattr(torch, config.tokenizers.visual.encoding_dtype))
        views = self.image_views(embeds=share.embeds, predicts=share.predicts)
        return PretrainingRankTask.open(
            self,
            share,
            functools.partial(build_streams, config, text_tokenizer),
            functools.partial(pack, shape=image_shape(config), views=views),
            files={
                "tokenizers.text.path": config.tokenizers.text.path if config.data.has_texts else None,
                "tokenizers.visual.path": config.tokenizers.visual.path if config.data.has_images else None,
            },
            model=config.model,
            validation_sources=config.data.source_names(),
            text_tokenizer=text_tokenizer,
            encoder=encoder,
        )

    def _tokenizer_flops(self) -> float:
        visual, data = self.config.tokenizers.visual, self.config.data
        rows = (data.images.samples_per_step + data.pairs.samples_per_step) * (1 + visual.grid_size**2)
        width = visual.hidden_size
        flops = visual.num_layers * rows * (2 * 12 * width**2 + 4 * (1 + visual.grid_size**2) * width)
        is_slower = visual.encoding_dtype == "float32" and self.config.options.is_bf16
        return (_FLOAT32_COST if is_slower else 1) * flops


TASK = Pretraining

_FLOAT32_COST = 9
"""Modelled time of the tokenizer's encoder in float32 on an H100, relative to bf16 (BENCHMARKS.md)."""
_TITLES = {
    "image_mim": "images: masked patches",
    "text_mlm": "texts: masked tokens",
    "pair_mim": "pairs: masked patches",
    "pair_mlm": "pairs: masked tokens",
}


def _check_visual_tokenizer(config: RunConfig) -> None:
    model, visual = config.model, config.tokenizers.visual
    if not visual.path:
        raise ConfigError(
            "tokenizers.visual.path is missing: images and pairs need a visual tokenizer. Name its file, or leave both "
            "streams out (samples_per_step 0, no validation) for a run on texts alone."
        )
    if visual.grid_size != model.grid_size:
        raise ConfigError(
            f"tokenizers.visual: {visual.image_size} px / patch {visual.patch_size} gives a grid of "
            f"{visual.grid_size}, but the model's {model.image_size} px / patch {model.patch_size} gives "
            f"a grid of {model.grid_size}. Set tokenizers.visual.image_size to {model.grid_size * visual.patch_size}."
        )
    if visual.codebook_size != model.visual_vocab_size:
        raise ConfigError(
            f"model.visual_vocab_size={model.visual_vocab_size} must equal tokenizers.visual.codebook_size="
            f"{visual.codebook_size}."
        )
