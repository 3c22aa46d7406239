"""Tests the normal form of answers, the list of answers, and soft scores."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.config import ConfigError
from beit3_ds.tasks.vqa.answers import AnswerVocabulary, accuracy_of_matches, main_answer, normalize_answer, soft_scores


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The two dogs.", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("1,000", "1000"),
        ("5:30", "5:30"),
        ("2.5 feet.", "2.5 feet"),
        ("red/white", "red white"),
        ("red / white", "red white"),
        ("t-shirt", "t shirt"),
        ("1,000 t-shirts", "1000 tshirts"),  # a comma between digits removes all marks instead of separating words
        ("(right)", "right"),
        ("frisbee?", "frisbee"),
        ("a\tcat\n", "cat"),
        ("the", ""),
        ("Somebody'd", "somebodyd"),  # the evaluator's own list has it the wrong way round
    ],
)
def test_normal_form(answer: str, normal: str) -> None:
    assert normalize_answer(answer) == normal


@given(st.lists(st.sampled_from(["yes", "no", "red", "2"]), min_size=10, max_size=10))
def test_soft_scores_average_over_nine_of_ten(answers: list[str]) -> None:
    for answer, score in soft_scores(answers).items():
        left_out = [answers[:i] + answers[i + 1 :] for i in range(10)]
        assert score == pytest.approx(sum(min(1, nine.count(answer) / 3) for nine in left_out) / 10, abs=1e-12)
        assert round(score, 9) == (0, 0.3, 0.6, 0.9, 1)[min(4, answers.count(answer))]


def test_other_numbers_of_answers() -> None:
    assert soft_scores(["Red."]) == {"red": 1.0}  # catches a question with one answer that can never be right
    assert 0 < accuracy_of_matches(1, 30) < accuracy_of_matches(2, 30) < 1
    with pytest.raises(ConfigError, match="without answers"):
        accuracy_of_matches(0, 0)


def test_answers_in_one_normal_form_count_together() -> None:
    assert soft_scores(["A dog", "dog.", "cat"] + ["x"] * 7) == pytest.approx({"dog": 0.6, "cat": 0.3, "x": 1.0})
    assert main_answer(["cat", "A dog", "dog."]) == "dog"


@given(st.lists(st.sampled_from(["Yes", "yes", "no.", "the red", "red", "2", "two"]), max_size=60), st.integers(1, 5))
def test_the_list_holds_frequent_answers(answers: list[str], minimum: int) -> None:
    counts = Counter(normalize_answer(answer) for answer in answers)
    frequent = {answer for answer, count in counts.items() if count >= minimum}
    if not frequent:
        with pytest.raises(ConfigError, match="min_answer_occurrences"):
            AnswerVocabulary.build(answers, minimum)
        return
    vocabulary = AnswerVocabulary.build(answers, minimum)
    assert set(vocabulary) == frequent and len(vocabulary) == len(frequent)
    firsts = [[normalize_answer(answer) for answer in answers].index(answer) for answer in vocabulary]
    assert firsts == sorted(firsts)  # catches an order that depends on counts or on hashes


def test_targets_are_scores_by_label() -> None:
    vocabulary = AnswerVocabulary(["no", "yes"])
    assert vocabulary.targets(["Yes", "yes", "maybe"] + ["no"] * 7) == pytest.approx({0: 1.0, 1: 0.6})
    assert vocabulary.targets(["maybe"] * 10) == {}


def test_a_saved_list_is_read_again(tmp_path: Path) -> None:
    vocabulary = AnswerVocabulary(["no", "éclair", "2"])
    vocabulary.save(tmp_path / "answers.jsonl")
    loaded = AnswerVocabulary.load(tmp_path / "answers.jsonl")
    assert loaded.answers == vocabulary.answers and loaded.digest() == vocabulary.digest()
    assert AnswerVocabulary(["2", "no", "éclair"]).digest() != vocabulary.digest()  # catches a digest without order


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"answer": "no", "label": 1}', r"answers\.jsonl:1 has label 1 instead of 0"),
        ('{"answer": "no", "label": 0}\n{"answer": "no", "label": 1}', "occurs twice"),
        ('{"answer": "No.", "label": 0}', "Write it as 'no'"),
        ('{"answer": "no"}', r"answers\.jsonl:1 has no 'label'"),
    ],
)
def test_damaged_lists_are_refused(lines: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text(lines)
    with pytest.raises(ConfigError, match=message):
        AnswerVocabulary.load(tmp_path / "answers.jsonl")
