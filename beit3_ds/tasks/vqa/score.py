"""Computes the accuracy of answers as the official VQA evaluator computes it."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from beit3_ds.tasks.vqa.answers import accuracy_of_share, normalize_answer, strip_answer


class ScoredQuestion(NamedTuple):
    """Holds a question with its answers and a prediction."""

    answers: Sequence[str]
    """Answers that people gave; ten in the official files."""
    prediction: str
    """Answer of the model."""
    question_type: str = ""
    """First words of the question, as the official files group questions; empty if unknown."""
    answer_type: str = ""
    """`yes/no`, `number` or `other` in the official files; empty if unknown."""


def question_accuracy(answers: Sequence[str], prediction: str) -> float:
    """Returns the accuracy of one answer, from 0 to 1.

    Answers are compared in normal form, except where all people wrote exactly the same: the official evaluator then
    compares the texts as they are.

    Raises:
        ConfigError: if there are no answers.
    """
    given = [strip_answer(answer) for answer in answers]
    prediction = strip_answer(prediction)
    if len(set(given)) > 1:
        given, prediction = [normalize_answer(answer) for answer in given], normalize_answer(prediction)
    return accuracy_of_share(given.count(prediction), len(given))


def score_questions(questions: Iterable[ScoredQuestion]) -> dict[str, float]:
    """Returns the mean accuracy in percent: `accuracy`, and one figure per type of question and answer.

    Figures of types are named `accuracy/question/TYPE` and `accuracy/answer/TYPE`. Like the official evaluator's they
    have two decimals. The order of the questions does not change them.

    Raises:
        ConfigError: if a question has no answers.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for question in questions:
        accuracy = question_accuracy(question.answers, question.prediction)
        groups["accuracy"].append(accuracy)
        for kind, name in (("question", question.question_type), ("answer", question.answer_type)):
            if name:
                groups[f"accuracy/{kind}/{name}"].append(accuracy)
    return mean_percentages(groups)


def mean_percentages(groups: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Returns the mean of each group in percent, with two decimals; `fsum` makes it independent of the order."""
    return {name: round(100 * math.fsum(values) / len(values), 2) for name, values in sorted(groups.items())}
