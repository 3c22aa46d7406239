"""Normalises answers to questions, builds the list of possible answers, and computes soft scores."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from beit3_ds.atomic_file import atomic_write
from beit3_ds.config import ConfigError
from beit3_ds.data.files.json_lines import iterate_json_lines
from beit3_ds.tasks.vqa.contractions import CONTRACTIONS

MIN_OCCURRENCES = 9
"""Default of `task.min_answer_occurrences`.

With this value, VQAv2's training and validation splits give the usual list of 3,129 answers.
"""

_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the evaluator passes re.UNICODE (32) to `re.sub` as the maximum number of replacements
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"} | {
    **{"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
}


def strip_answer(answer: str) -> str:
    """Replaces line breaks and tabs in an answer by spaces, and strips white space at both ends."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(answer: str) -> str:
    """Returns an answer in normal form; the official evaluator compares answers in this form.

    Changes the answer to lower case, removes most punctuation and all articles, adds missing apostrophes to
    contractions, and writes number words up to ten as digits. For example, "The two dogs." becomes "2 dogs".
    """
    answer = strip_answer(answer)
    removes_all = _DIGIT_COMMA_DIGIT.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        at_border = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if removes_all or at_border else " ")
    words = _PERIOD.sub("", text, count=_MAX_PERIODS).lower().split()
    numbered = (_NUMBERS.get(word, word) for word in words)
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)


def accuracy_of_matches(num_matches: int, num_answers: int) -> float:
    """Returns the accuracy, from 0 to 1, of an answer that `num_matches` of `num_answers` people gave.

    The official accuracy is defined for ten people (Antol et al., 2015, arXiv:1505.00468). The accuracy is the mean of
    min(1, m / 3) over the ten subsets of nine people, where m people of a subset gave the answer. With ten people, the
    possible values are 0, .3, .6, .9 and 1. For another number of people, `num_matches` is first scaled to ten people.
    If only one person was asked, that person's answer therefore has the accuracy 1.

    Raises:
        ConfigError: if there are no answers.
    """
    if not num_answers:
        raise ConfigError("vqa: a question without answers has no accuracy. Score a split that has annotations.")
    matches = 10 * num_matches / num_answers
    left_out = matches * min(1.0, max(0.0, matches - 1) / 3) + (10 - matches) * min(1.0, matches / 3)
    return left_out / 10


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
    """Returns the accuracy of each answer that people gave to a question. These scores are the training targets.

    The keys are the answers as `normalize_answer` returns them.
    """
    counts = Counter(map(normalize_answer, answers))
    return {answer: accuracy_of_matches(count, len(answers)) for answer, count in counts.items()}


def main_answer(answers: Sequence[str]) -> str:
    """Normalizes the answers with `normalize_answer`, and returns the most frequent normalized answer.

    If several are equally frequent, returns the first of them.
    """
    return Counter(map(normalize_answer, answers)).most_common(1)[0][0]


class AnswerVocabulary:
    """Holds the possible answers of a model; the label of an answer is its index in the list."""

    def __init__(self, answers: Iterable[str]) -> None:
        """Stores and checks the answers.

        Args:
            answers: the answers, in the order of their labels.

        Raises:
            ConfigError: if an answer occurs twice or is not in normal form (`normalize_answer`).
        """
        self.answers = tuple(answers)
        for label, answer in enumerate(self.answers):
            if self.labels[answer] != label:
                raise ConfigError(f"vqa: the answer {answer!r} occurs twice, as {label} and {self.labels[answer]}.")
            if normalize_answer(answer) != answer:
                raise ConfigError(
                    f"vqa: answer {label}, {answer!r}, is not in normal form, so it could never be right. Write it as "
                    f"{normalize_answer(answer)!r}."
                )

    def __len__(self) -> int:
        """Returns the number of answers."""
        return len(self.answers)

    def __iter__(self) -> Iterator[str]:
        """Yields the answers in the order of their labels."""
        return iter(self.answers)

    @cached_property
    def labels(self) -> Mapping[str, int]:
        """Maps answers to labels."""
        return {answer: label for label, answer in enumerate(self.answers)}

    def digest(self) -> str:
        """Returns 16 hexadecimal digits of a hash of the answers, in the order of the labels."""
        return hashlib.sha256(json.dumps(self.answers).encode()).hexdigest()[:16]

    def targets(self, answers: Sequence[str]) -> dict[int, float]:
        """Returns the soft scores of people's answers to a question, by label; ignores unlisted answers."""
        return {self.labels[answer]: score for answer, score in soft_scores(answers).items() if answer in self.labels}

    @classmethod
    def build(cls, main_answers: Iterable[str], min_occurrences: int = MIN_OCCURRENCES) -> "AnswerVocabulary":
        """Builds the list of frequent answers, in the order of their first occurrence.

        Args:
            main_answers: main answer of every training question (`multiple_choice_answer` in the official files).
            min_occurrences: minimum number of occurrences of a listed answer in `main_answers`.

        Raises:
            ConfigError: if no answer occurs often enough.
        """
        counts = Counter(map(normalize_answer, main_answers))
        answers = [answer for answer, count in counts.items() if count >= min_occurrences]
        if not answers:
            raise ConfigError(
                f"vqa: none of {len(counts)} different answers to {counts.total()} training questions occurs "
                f"{min_occurrences} times. Lower task.min_answer_occurrences."
            )
        return cls(answers)

    def save(self, path: Path) -> None:
        """Writes one JSON object per line with the keys `answer` and `label`, the format of `answer2label.txt`."""
        with atomic_write(path) as file:
            for label, answer in enumerate(self.answers):
                file.write(json.dumps({"answer": answer, "label": label}).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> "AnswerVocabulary":
        """Reads an answer list with one JSON object per line; the keys are `answer` and `label`.

        Raises:
            ConfigError: if the file cannot be read or a line has another format; the message names the line.
        """
        answers: list[str] = []
        for number, entry in iterate_json_lines(str(path), {"answer": str, "label": int}):
            if entry["label"] != len(answers):
                raise ConfigError(
                    f"vqa: {path}:{number} has label {entry['label']} instead of {len(answers)}: labels number the "
                    "answers from 0. Use the list that was saved with the weights."
                )
            answers.append(entry["answer"])
        return cls(answers)
