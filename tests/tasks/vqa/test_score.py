"""Compares the accuracy of answers with the official evaluator."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.config import ConfigError
from beit3_ds.tasks.vqa.score import ScoredQuestion, question_accuracy, score_questions

OFFICIAL = Path(__file__).parents[2] / "fixtures" / "golden" / "vqa_scores.json"


def test_equals_the_official_evaluator() -> None:
    questions = json.loads(OFFICIAL.read_text())
    assert len(questions) == 600
    for question in questions:
        found = round(100 * question_accuracy(question["answers"], question["prediction"]), 2)
        assert found == question["accuracy"], question
    scores = score_questions(ScoredQuestion(question["answers"], question["prediction"]) for question in questions)
    assert scores == {"accuracy": round(sum(question["accuracy"] for question in questions) / 600, 2)}


def test_equal_texts_are_compared_as_they_are() -> None:
    assert question_accuracy(["Left"] * 10, "left") == 0.0  # the official evaluator's own rule
    assert question_accuracy(["Left"] * 9 + ["right"], "left") == 1.0


QUESTIONS = st.builds(
    ScoredQuestion,
    st.lists(st.sampled_from(["yes", "no", "1"]), min_size=10, max_size=10),
    st.sampled_from(["yes", "no", "one"]),
    st.sampled_from(["is the", "how many"]),
    st.sampled_from(["yes/no", "number"]),
)


@given(st.lists(QUESTIONS, min_size=1, max_size=12))
def test_groups_and_order(questions: list[ScoredQuestion]) -> None:
    scores = score_questions(questions)
    for question_type in {question.question_type for question in questions}:
        group = [question for question in questions if question.question_type == question_type]
        assert scores[f"accuracy/question/{question_type}"] == score_questions(group)["accuracy"]
    for answer_type in {question.answer_type for question in questions}:
        group = [question for question in questions if question.answer_type == answer_type]
        assert scores[f"accuracy/answer/{answer_type}"] == score_questions(group)["accuracy"]
    assert score_questions(questions[::-1]) == scores  # catches sums that depend on the order of ranks


def test_a_test_split_is_not_scored() -> None:
    with pytest.raises(ConfigError, match="without answers"):
        score_questions([ScoredQuestion([], "yes")])
