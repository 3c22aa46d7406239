"""Implements the NLVR2 task: deciding whether a statement about two images is true (paper section 3.1)."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F

from beit3_ds.atomic_file import atomic_write
from beit3_ds.config import ModelConfig
from beit3_ds.config.data import Split
from beit3_ds.data.samples import SourceSamples, Stream
from beit3_ds.parallel import TensorParallel
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks.nlvr2.files import Statements
from beit3_ds.tasks.nlvr2.head import StatementHead
from beit3_ds.tasks.nlvr2.samples import FORMATS, INDICES, StatementSamples, build_stream, pack
from beit3_ds.tasks.nlvr2.score import JudgedStatement, score_statements
from beit3_ds.tasks.rank_task import Evaluator, RankShare, RankTask
from beit3_ds.tasks.result_page import ShownSample, choose_shown, write_result_page
from beit3_ds.tasks.results import GatheredResults, SampleResults
from beit3_ds.tasks.task import Headline, Task, Term
from beit3_ds.tokenizers.text import load_text_tokenizer

_SHOWN = 60


@dataclass(frozen=True, kw_only=True)
class StatementRankTask(RankTask):
    """Runs NLVR2 on one rank; holds the opened statements."""

    def evaluate(self, evaluator: Evaluator, split: Split, folder: ResultFolder | None) -> dict[str, float]:
        """Answers all statements of a split.

        With `folder`, also writes `predictions.csv`, in the format of NLVR2's scoring script, and `statements.html`.

        Returns:
            `statement` (mean cross entropy), `accuracy` and `consistency` on the main rank. Empty on other ranks, and
            for a split without labels.
        """
        results = SampleResults()
        for batch, logits in evaluator.predict(evaluator.batches(split)):
            if logits is not None and evaluator.mesh.tensor.rank == 0:
                results.add(batch.targets[INDICES], logits=logits.float())
        found = results.gather(evaluator.mesh)
        if found is None or not len(found):
            return {}
        return _Judgements(self.evaluation[split].streams["pairs"], found).report(folder)


class _Judgements:
    """Combines the statements of a split with the model's answers, on the main rank."""

    def __init__(self, stream: Stream, found: GatheredResults) -> None:
        self._logits = found.tensor("logits")
        self._guesses: list[bool] = (self._logits.argmax(1) == 1).tolist()
        places = [stream.sources.locate(index) for index in found.indices.tolist()]
        self._samples = [(_statements(samples), index) for samples, index in places]
        self._labels = [statements.label(index) for statements, index in self._samples]

    def report(self, folder: ResultFolder | None) -> dict[str, float]:
        metrics = {} if None in self._labels else self._metrics()
        if folder is not None:
            folder.write("predictions.csv", self._write_predictions)
            page = functools.partial(self._write_page, metrics=metrics)
            folder.write("statements.html", page)
        return metrics

    def _metrics(self) -> dict[str, float]:
        labels = [bool(label) for label in self._labels]
        loss = F.cross_entropy(self._logits.double(), torch.tensor(labels, dtype=torch.int64))
        judged = zip(self._samples, labels, self._guesses, strict=True)
        return {"statement": loss.item()} | score_statements(
            JudgedStatement(statements.group(index), label, guess) for (statements, index), label, guess in judged
        )

    def _write_predictions(self, path: Path) -> None:
        with atomic_write(path) as file:
            for (statements, index), guess in zip(self._samples, self._guesses, strict=True):
                file.write(f"{statements.identifier(index)},{guess}\n".encode())

    def _write_page(self, path: Path, metrics: Mapping[str, float]) -> None:
        judged = zip(self._labels, self._guesses, strict=True)
        is_right = [None if label is None else label == guess for label, guess in judged]
        samples = [self._shown(place, is_right[place]) for place in choose_shown(is_right, _SHOWN)]
        write_result_page(path, "Statements about two images", metrics, samples, "Left and right image of each sample.")

    def _shown(self, place: int, is_right: bool | None) -> ShownSample:
        statements, index = self._samples[place]
        truth = self._labels[place]
        share = self._logits[place].softmax(0)[1].item()
        lines = {"model": f"{self._guesses[place]} ({share:.0%} true)", "truth": "" if truth is None else str(truth)}
        images = [statements.image(index, side) for side in (0, 1)]
        return ShownSample(images=images, title=statements.sentence(index), lines=lines, is_right=is_right)


def _statements(samples: SourceSamples) -> Statements:
    assert isinstance(samples, StatementSamples), f"{samples} are no statements"
    return samples.statements


class StatementTask(Task):
    """Defines NLVR2: the model decides whether a statement about two images is true (paper section 3.1)."""

    has_validation_loss: ClassVar[bool] = False
    formats: ClassVar[Mapping[str, Sequence[str]]] = {"pairs": FORMATS}
    headline: ClassVar[Headline] = Headline("accuracy")
    pairs_per_sample: ClassVar[int] = 2
    terms = (
        Term("statement", "pairs", "statements"),
        Term("accuracy", "pairs", "statements judged right", weight=0.0, unit="share"),
    )

    def build_head(self, model: ModelConfig, tensor: TensorParallel) -> StatementHead:
        """Builds the head for statements about two images, with uninitialised parameters."""
        return StatementHead(model, tensor)

    def open(self, share: RankShare) -> StatementRankTask:
        """Opens the tokenizer and the statements that a rank reads.

        Raises:
            ConfigError: if a file cannot be read or does not fit the model.
        """
        config = self.config
        tokenizer = load_text_tokenizer(config)
        assert tokenizer is not None, "statements are pairs, which need a text tokenizer"
        return StatementRankTask.open(
            self,
            share,
            functools.partial(build_stream, config, tokenizer),
            functools.partial(pack, model=config.model, embeds=share.embeds),
            files={"tokenizers.text.path": config.tokenizers.text.path},
        )


TASK = StatementTask
