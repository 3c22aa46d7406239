"""Computes the accuracy of answers as the official VQA evaluator does (Antol et al., 2015, arXiv:1505.00468)."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from beit3_ds.tasks.vqa.answers import accuracy_of_matches, normalize_answer, strip_answer


class ScoredQuestion(NamedTuple):
    """Holds the answers that people gave to a question, and the model's answer."""

    answers: Sequence[str]
    """Answers that people gave; ten in the official files."""
    prediction: str
    """Answer of the model."""
    question_type: str = ""
    """Type of the question: in the official files, its first words, such as `what color is the`; empty if unknown."""
    answer_type: str = ""
    """Type of the answer: in the official files, `yes/no`, `number` or `other`; empty if unknown."""


def question_accuracy(answers: Sequence[str], prediction: str) -> float:
    """Returns the accuracy of one predicted answer, from 0 to 1.

    The prediction and people's `answers` are compared in normal form (`normalize_answer`). However, if all people gave
    the same answer, only white space is normalised (`strip_answer`), as in the official evaluator.

    Raises:
        ConfigError: if people gave no answers.
    """
    given = [strip_answer(answer) for answer in answers]
    prediction = strip_answer(prediction)
    if len(set(given)) > 1:
        given, prediction = [normalize_answer(answer) for answer in given], normalize_answer(prediction)
    return accuracy_of_matches(given.count(prediction), len(given))


def score_questions(questions: Iterable[ScoredQuestion]) -> dict[str, float]:
    """Returns the mean accuracy in percent: one value for all questions, one per question type, and one per answer
    type.

    The keys are `accuracy`, `accuracy/question/TYPE` and `accuracy/answer/TYPE`. As in the official evaluator, values
    are rounded to two decimals. The values do not depend on the order of the questions.

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
    """Returns the mean of each group in percent, rounded to two decimals; the order of values has no effect."""
    return {name: round(100 * math.fsum(values) / len(values), 2) for name, values in sorted(groups.items())}
