"""Implements the captioning task: masked fine-tuning with causal captions, and generation (paper section 3.1)."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from beit3_ds.config import ConfigError, ModelConfig, RunConfig
from beit3_ds.config.data import IMAGE_FORMATS
from beit3_ds.data.samples import Split
from beit3_ds.model import Head, StepFeatures, StepLoss
from beit3_ds.model.generation import BeamSearch
from beit3_ds.parallel import TensorParallel
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks.captioning.config import CaptioningConfig
from beit3_ds.tasks.captioning.evaluation import DescribedSplit, describe_missing_generation, predict_split
from beit3_ds.tasks.captioning.head import CaptionHead, sum_best_tokens
from beit3_ds.tasks.captioning.packing import pack
from beit3_ds.tasks.captioning.samples import CAPTION_FORMATS, build_stream
from beit3_ds.tasks.rank_task import Evaluator, RankShare, RankTask
from beit3_ds.tasks.task import Headline, Task, Term
from beit3_ds.tokenizers.text import TextTokenizer, load_text_tokenizer


class BestTokensLoss:
    """Computes the loss of a step; after `drop_after_steps` steps, leaves out the tokens with the largest losses."""

    def __init__(self, settings: CaptioningConfig) -> None:
        """Stores the settings, and sets the current step to 0."""
        self._settings, self._step = settings, 0

    def begin(self, step: int) -> None:
        """Sets the number of the current training step, from 0."""
        self._step = step

    def sums(self, features: StepFeatures) -> Tensor:
        """Returns the summed loss and the number of right predictions of a step, (2,) float32 (`sum_best_tokens`)."""
        is_dropping = self._step >= self._settings.drop_after_steps
        return sum_best_tokens(features, self._settings.dropped_share if is_dropping else 0.0)


@dataclass(frozen=True, kw_only=True)
class CaptioningRankTask(RankTask):
    """Runs captioning on one rank; holds the opened images and captions."""

    settings: CaptioningConfig
    """The task's settings."""
    best_tokens_loss: BestTokensLoss
    """Object that computes the loss and drops the tokens with the largest losses. The training step calls the same
    object (`Captioning.step_loss`). The rank task tells the object the number of the current step."""
    tokenizer: TextTokenizer
    """Converts captions to token ids and back."""

    def before_step(self, evaluator: Evaluator, step: int) -> None:
        """Passes the step number to the loss, which drops no tokens in the first `drop_after_steps` steps."""
        self.best_tokens_loss.begin(step)

    def resume(self, evaluator: Evaluator, done: int) -> None:
        """Passes the number of the last finished step to the loss."""
        self.best_tokens_loss.begin(done - 1)

    def evaluate(self, evaluator: Evaluator, split: Split, folder: ResultFolder | None) -> dict[str, float]:
        """Predicts the masked tokens of all captions of a split; depending on `task.generation`, also generates
        captions.

        If the layout of ranks does not allow generation, the main rank prints the reason, and only the metrics of
        masked tokens are returned.
        """
        settings, search = self.settings, None
        if settings.generation == "always" or (settings.generation == "at_end" and folder is not None):
            reason = describe_missing_generation(evaluator)
            if not reason:
                search = build_search(settings)
            elif evaluator.mesh.is_main:
                print(f"captions: none are written, because {reason}. Use `beit3 evaluate`.", flush=True)
        results = predict_split(evaluator, split, settings.label_smoothing, search, self.tokenizer)
        if results is None or not len(results):
            return {}
        described = DescribedSplit(self.evaluation[split].streams["pairs"], results, search)
        metrics = described.metrics(official=settings.official_scores)
        if folder is not None:
            described.write(folder, metrics, settings.shown_captions)
        return metrics


def build_search(settings: CaptioningConfig) -> BeamSearch:
    """Builds the beam search from the task's settings."""
    return BeamSearch(
        num_beams=settings.num_beams, length_penalty=settings.length_penalty, max_length=settings.max_length
    )


class Captioning(Task):
    """Defines captioning: the model predicts masked tokens from the image and the earlier tokens of the caption.

    Follows paper section 3.1.
    """

    Settings = CaptioningConfig
    settings: CaptioningConfig
    predicts_words: ClassVar[bool] = True
    causal_captions: ClassVar[bool] = True
    has_validation_loss: ClassVar[bool] = False
    formats: ClassVar[Mapping[str, Sequence[str]]] = {"pairs": (*IMAGE_FORMATS, *CAPTION_FORMATS)}
    headline: ClassVar[Headline] = Headline("word_accuracy")
    terms = (
        Term("words", "pairs", "captions: masked words", unit="divergence from smoothed labels (nats)"),
        Term("word_accuracy", "pairs", "masked words found", weight=0.0, unit="share"),
    )

    def __init__(self, config: RunConfig) -> None:
        """Checks the task's settings against the model's configuration.

        Raises:
            ConfigError: if the model has too few text positions to generate captions of `task.max_length` tokens.
        """
        super().__init__(config)
        settings, longest = self.settings, config.model.max_text_length
        if settings.generation != "never" and settings.max_length - 1 > longest:
            raise ConfigError(
                f"task.max_length={settings.max_length} needs {settings.max_length - 1} positions, but "
                f"model.max_text_length={longest}. Lower task.max_length or raise model.max_text_length."
            )
        self._best_tokens_loss = BestTokensLoss(settings)

    def build_head(self, model: ModelConfig, tensor: TensorParallel) -> Head:
        """Builds the captioning head with uninitialised parameters."""
        settings = self.settings
        return CaptionHead(
            model, tensor, label_smoothing=settings.label_smoothing, compares_tokens=settings.dropped_share > 0
        )

    @property
    def step_loss(self) -> StepLoss | None:
        """Returns the loss function that drops tokens with large losses; None if `task.dropped_share` is 0."""
        return self._best_tokens_loss.sums if self.settings.dropped_share else None

    def head_flops(self, term_counts: Sequence[float]) -> float:
        """Returns the floating-point operations of the head's forward pass; a multiply-add counts as 2.

        Args:
            term_counts: one number per loss term; only the first, the number of masked tokens, is used.
        """
        return 2 * term_counts[0] * self.config.model.hidden_size * self.config.model.text_vocab_size

    def expected_head_flops(self) -> float:
        """Returns the floating-point operations of the head per step, forward and backward."""
        data = self.config.data
        masked = data.pairs.samples_per_step * data.pair_text_length * self.settings.mask_ratio
        return 3 * self.head_flops((masked, 0))

    def open(self, share: RankShare) -> CaptioningRankTask:
        """Opens the tokenizer, and the images and captions that a rank reads.

        Raises:
            ConfigError: if a file cannot be read or does not fit the model.
        """
        config = self.config
        tokenizer = load_text_tokenizer(config)
        assert tokenizer is not None, "captions need a text tokenizer"
        return CaptioningRankTask.open(
            self,
            share,
            functools.partial(build_stream, config, tokenizer, self.settings.mask_ratio),
            functools.partial(pack, model=config.model, embeds=share.embeds),
            files={"tokenizers.text.path": config.tokenizers.text.path},
            settings=self.settings,
            best_tokens_loss=self._best_tokens_loss,
            tokenizer=tokenizer,
        )


TASK = Captioning
