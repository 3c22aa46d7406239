"""Implements visual question answering as classification over the most frequent answers (paper section 3.1)."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from beit3_ds.config import ModelConfig, RunConfig
from beit3_ds.config.data import Split
from beit3_ds.data.samples import Stream
from beit3_ds.parallel import TensorParallel
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks.rank_task import Evaluator, RankShare, RankTask
from beit3_ds.tasks.task import Headline, Task, Term
from beit3_ds.tasks.vqa.answer_list import choose_answers, read_stored_answers, write_or_check_answers
from beit3_ds.tasks.vqa.answers import AnswerVocabulary
from beit3_ds.tasks.vqa.config import VqaConfig
from beit3_ds.tasks.vqa.evaluation import AnsweredSplit, answer_split, write_files
from beit3_ds.tasks.vqa.head import AnswerHead
from beit3_ds.tasks.vqa.packing import pack
from beit3_ds.tasks.vqa.samples import FORMATS, build_stream, open_split
from beit3_ds.tokenizers.text import load_text_tokenizer


@dataclass(frozen=True, kw_only=True)
class VqaRankTask(RankTask):
    """Runs visual question answering on one rank; holds the opened questions."""

    settings: VqaConfig
    """The task's settings."""
    vocabulary: AnswerVocabulary | None
    """List of possible answers; None on ranks that read no questions."""

    def evaluate(self, evaluator: Evaluator, split: Split, folder: ResultFolder | None) -> dict[str, float]:
        """Answers all questions of a split and returns the metrics.

        The metrics are the official accuracies in percent, and the means of the loss and of the target scores. The
        result is empty if a source has questions without answers from people.

        The metrics include questions whose answers are not in the answer list, although the model cannot answer these
        questions. Microsoft's BEiT-3 code leaves such questions out and can therefore report a higher accuracy.
        """
        results = answer_split(evaluator, split)
        if results is None or not len(results):
            return {}
        assert self.vocabulary is not None, "the main rank reads questions"
        answered = AnsweredSplit(self.evaluation[split], results, self.vocabulary)
        metrics = answered.metrics()
        if folder is not None:
            write_files(answered, metrics, folder, self.settings.page_samples)
        return metrics


class Vqa(Task):
    """Defines visual question answering as classification over frequent answers (VQAv2; paper section 3.1)."""

    Settings = VqaConfig
    settings: VqaConfig
    has_validation_loss: ClassVar[bool] = False
    formats: ClassVar[Mapping[str, Sequence[str]]] = {"pairs": FORMATS}
    headline: ClassVar[Headline] = Headline("accuracy")

    def __init__(self, config: RunConfig) -> None:
        """Loads the settings; `open` determines the answer list."""
        super().__init__(config)
        self._vocabulary: AnswerVocabulary | None = None

    @property
    def terms(self) -> tuple[Term, ...]:
        """Returns the loss term and the metric.

        The loss is the binary cross entropy, summed over answers. The metric is the target score of the model's answer.
        """
        return (
            Term("answers", "pairs", "questions: answers", unit="binary cross entropy, summed over answers (nats)"),
            Term("soft_accuracy", "pairs", "questions: score of the answer", weight=0.0, unit="share"),
        )

    def build_head(self, model: ModelConfig, tensor: TensorParallel) -> AnswerHead:
        """Builds the head that scores answers, with uninitialised parameters."""
        return AnswerHead(model, self.settings.num_answers, tensor)

    def head_flops(self, term_counts: Sequence[float]) -> float:
        """Returns the floating-point operations of the head's forward pass; a multiply-add counts as 2.

        Args:
            term_counts: one number per loss term; only the first, the number of questions, is used.
        """
        width = self.config.model.hidden_size
        return float(term_counts[0] * 2 * (width**2 + 2 * width**2 + 2 * width * self.settings.num_answers))

    def expected_head_flops(self) -> float:
        """Returns the floating-point operations of the head per step, forward and backward."""
        return 3 * self.head_flops((self.config.data.pairs.samples_per_step, 0))

    def describe(self) -> dict[str, Any]:
        """Returns the task's name and settings and, after `open`, the answer list."""
        answers = {} if self._vocabulary is None else {"answers": list(self._vocabulary)}
        return super().describe() | answers

    def open(self, share: RankShare) -> VqaRankTask:
        """Opens the questions that a rank reads, and determines the answer list.

        Raises:
            ConfigError: if a file cannot be read, if an image is missing, if training or validation questions have no
                answers, or if the answer list does not fit the head or the weights.
        """
        config, tokenizer = self.config, load_text_tokenizer(self.config)
        files = {"tokenizers.text.path": config.tokenizers.text.path}
        if not share.reads:
            return VqaRankTask(settings=self.settings, vocabulary=None, files=files)
        assert tokenizer is not None, "pairs have a text tokenizer"
        opened = {split: open_split(config, split) for split in share.splits}
        training = opened.get("train", [])
        stored = read_stored_answers(self.weights_description)
        vocabulary = choose_answers(self.settings, training, stored, self.weights_name)
        self._vocabulary = vocabulary
        if share.is_main and training:
            write_or_check_answers(Path(config.training.output_dir), vocabulary)

        def build_streams(split: Split) -> dict[str, Stream]:
            questions = opened[split]
            return {"pairs": build_stream(config, questions, vocabulary, tokenizer, split)} if questions else {}

        return VqaRankTask.open(
            self,
            share,
            build_streams,
            functools.partial(
                pack,
                model=config.model,
                num_answers=self.settings.num_answers,
                embeds=share.embeds,
                predicts=share.predicts,
            ),
            files=files,
            settings=self.settings,
            vocabulary=vocabulary,
        )


TASK = Vqa
