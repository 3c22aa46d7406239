"""Answers all questions of a split, computes metrics, and writes result files and a page."""

# P pairs, A answers.

import json
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from beit3_ds.atomic_file import atomic_write
from beit3_ds.config.data import Split
from beit3_ds.data import EvaluationBatches
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks.rank_task import Evaluator
from beit3_ds.tasks.result_page import ShownSample, choose_shown, write_result_page
from beit3_ds.tasks.results import GatheredResults, SampleResults
from beit3_ds.tasks.vqa.answers import AnswerVocabulary
from beit3_ds.tasks.vqa.files import VqaQuestions
from beit3_ds.tasks.vqa.head import ANSWER_SCORES
from beit3_ds.tasks.vqa.packing import QUESTION_INDICES
from beit3_ds.tasks.vqa.samples import VqaSamples
from beit3_ds.tasks.vqa.score import ScoredQuestion, question_accuracy, score_questions

SUBMISSION, RESULTS, PAGE = "submission.json", "results.json", "answers.html"
"""Names of the result files: answers in the official format, metrics together with all answers, and an HTML page."""


def answer_split(evaluator: Evaluator, split: Split) -> GatheredResults | None:
    """Answers every question of a split; all ranks must call this function.

    Returns:
        Results per question on the main rank; None on other ranks. `answer` is the label of the model's answer. `loss`
        is the binary cross entropy, summed over all possible answers. `score` is the target score of the model's
        answer.
    """
    results = SampleResults()
    for batch, logits_PA in evaluator.predict(evaluator.batches(split)):
        if logits_PA is None or evaluator.mesh.tensor.rank:
            continue
        scores_PA = batch.targets[ANSWER_SCORES]
        loss_PA = F.binary_cross_entropy_with_logits(logits_PA, scores_PA, reduction="none")
        best_P = logits_PA.argmax(1)
        score_P = scores_PA.gather(1, best_P[:, None])[:, 0]
        results.add(batch.targets[QUESTION_INDICES], answer=best_P, loss=loss_PA.sum(1), score=score_P)
    return results.gather(evaluator.mesh)


class AnsweredSplit:
    """Combines the questions of a split with the model's answers, on the main rank.

    The argument `place` of the methods is the index of a question among the answered questions, from 0.
    """

    def __init__(self, batches: EvaluationBatches, results: GatheredResults, vocabulary: AnswerVocabulary) -> None:
        """Stores the samples, the gathered results and the answer list.

        Args:
            batches: samples of the split.
            results: result of `answer_split`.
            vocabulary: the answer list.
        """
        self._sources = batches.streams["pairs"].sources
        self._indices = results.indices.tolist()
        self._results = results
        labels = results.tensor("answer").tolist()
        self.answers = [vocabulary.answers[label] for label in labels]

    def __len__(self) -> int:
        """Returns the number of questions."""
        return len(self._indices)

    @property
    def has_human_answers(self) -> bool:
        """Returns whether all questions of the split have answers from people. Otherwise, the model's answers cannot be
        scored.
        """
        return all(samples.questions.has_answers for samples in self._questions())

    def locate(self, place: int) -> tuple[VqaQuestions, int]:
        """Returns the source of question number `place`, and the index of the question in this source."""
        samples, index = self._sources.locate(self._indices[place])
        assert isinstance(samples, VqaSamples)
        return samples.questions, index

    def identifier(self, place: int) -> int | str:
        """Returns the id of question number `place`."""
        questions, index = self.locate(place)
        return questions.identifier(index)

    def metrics(self) -> dict[str, float]:
        """Returns the official accuracies in percent, the mean loss, and the mean target score of the model's answers.

        Returns an empty dictionary if there are no questions, or if a source has questions without answers from people.
        """
        if not self.has_human_answers or not len(self):
            return {}
        scored = (self._scored(place) for place in range(len(self)))
        means = {"answers": "loss", "soft_accuracy": "score"}
        found = {name: self._results.tensor(key).double().mean().item() for name, key in means.items()}
        return found | score_questions(scored)

    def accuracy(self, place: int) -> float | None:
        """Returns the official accuracy, from 0 to 1, of the model's answer to question number `place`.

        Returns None if people's answers are missing for this question, or for any other question of the same source.
        """
        questions, index = self.locate(place)
        return question_accuracy(questions.answers(index), self.answers[place]) if questions.has_answers else None

    def _scored(self, place: int) -> ScoredQuestion:
        questions, index = self.locate(place)
        return ScoredQuestion(questions.answers(index), self.answers[place], *questions.types(index))

    def _questions(self) -> list[VqaSamples]:
        return [samples for samples in self._sources if isinstance(samples, VqaSamples)]


def write_files(split: AnsweredSplit, metrics: dict[str, float], folder: ResultFolder, page_samples: int) -> None:
    """Writes the submission file, the results file with all answers, and a page with `page_samples` questions."""
    places = range(len(split))
    submission = [{"question_id": split.identifier(place), "answer": split.answers[place]} for place in places]
    folder.write(SUBMISSION, lambda path: _write_json(path, submission))
    answers = [_describe(split, place) for place in places]
    results = {"metrics": metrics, "num_questions": len(split), "answers": answers}
    folder.write(RESULTS, lambda path: _write_json(path, results))
    folder.write(PAGE, lambda path: _write_page(path, split, metrics, page_samples))


def _write_page(path: Path, split: AnsweredSplit, metrics: dict[str, float], page_samples: int) -> None:
    places = range(len(split))
    accuracies = [split.accuracy(place) for place in places]
    is_right = [None if accuracy is None else accuracy > 0 for accuracy in accuracies]
    shown = [_show(split, place, is_right[place]) for place in choose_shown(is_right, page_samples)]
    note = f"{len(shown)} of {len(split)} questions, the wrong answers first; half are wrong if enough are."
    write_result_page(path, "Answers to questions about images", metrics, shown, note)


def _describe(split: AnsweredSplit, place: int) -> dict[str, Any]:
    found: dict[str, Any] = {"question_id": split.identifier(place), "answer": split.answers[place]}
    accuracy = split.accuracy(place)
    return found if accuracy is None else found | {"accuracy": accuracy}


def _show(split: AnsweredSplit, place: int, is_right: bool | None) -> ShownSample:
    questions, index = split.locate(place)
    lines = {"model": split.answers[place]}
    if questions.has_answers:
        lines["people"] = ", ".join(dict.fromkeys(questions.answers(index)))
    return ShownSample(
        images=[questions.image(index, 256)], title=questions.caption(index), lines=lines, is_right=is_right
    )


def _write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
