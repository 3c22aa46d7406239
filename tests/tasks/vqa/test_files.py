"""Tests reading of published files of questions and answers.

The fixtures follow the published descriptions of the formats. The official files were never read.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beit3_ds.config import ConfigError
from beit3_ds.tasks.vqa.files import VqaQuestions, read_visual_genome_questions, read_vqa_lines, read_vqav2


def question(number: int, image: int, text: str = "What is it?") -> dict[str, Any]:
    return {"question_id": number, "image_id": image, "question": text}


def annotation(number: int, image: int, *answers: str, kind: str = "other") -> dict[str, Any]:
    given = [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(answers, 1)]
    types = {"question_type": "what is", "answer_type": kind}
    return {"question_id": number, "image_id": image, "multiple_choice_answer": answers[0], "answers": given, **types}


def write(path: Path, questions: list[Any], annotations: list[Any] | None, subset: str = "val2014") -> VqaQuestions:
    asked, answered = path / "questions.json", path / "annotations.json"
    facts = {"info": {"version": "2.0"}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}}
    asked.write_text(json.dumps({**facts, "data_subtype": subset, "questions": questions}))
    if annotations is not None:
        answered.write_text(json.dumps({**facts, "data_subtype": subset, "annotations": annotations}))
    return read_vqav2(str(asked), str(answered) if annotations is not None else "", str(path))


def names(samples: VqaQuestions) -> list[str]:
    return [samples.name(index).rpartition("(")[2].rstrip(")") for index in range(len(samples))]


def test_vqav2(tmp_path: Path) -> None:
    questions = [question(262148000, 262148, "Where is he?"), question(393225001, 393225), question(262148002, 262148)]
    annotations = [
        annotation(262148002, 262148, *["yes"] * 9, "no", kind="yes/no"),
        annotation(262148000, 262148, *["at table"] * 10),
        annotation(393225001, 393225, *["2"] * 10, kind="number"),
    ]
    samples = pickle.loads(pickle.dumps(write(tmp_path, questions, annotations)))
    assert [samples.identifier(index) for index in range(3)] == [262148000, 393225001, 262148002]
    assert [samples.caption(index) for index in range(3)] == ["Where is he?", "What is it?", "What is it?"]
    assert names(samples)[0] == names(samples)[2] == "COCO_val2014_000000262148.jpg" and len(samples.paths) == 2
    assert samples.answers(2) == ["yes"] * 9 + ["no"]  # catches answers in the order of the annotations
    assert list(samples.main_answers()) == ["at table", "2", "yes"]
    assert samples.types(1) == ("what is", "number") and samples.types(2) == ("what is", "yes/no")
    assert [file.name for file in samples.files()] == ["questions.json", "annotations.json"]


@pytest.mark.parametrize("subset", ["test2015", "test-dev2015"])
def test_test_splits_share_images_and_have_no_answers(tmp_path: Path, subset: str) -> None:
    (tmp_path / "test2015").mkdir()
    samples = write(tmp_path, [question(1, 9)], None, subset)
    assert names(samples) == ["test2015/COCO_test2015_000000000009.jpg"]  # the folder above was given
    assert not samples.has_answers and samples.types(0) == ("", "")
    for read in (samples.main_answers, lambda: samples.answers(0)):
        with pytest.raises(ConfigError, match=r"questions\.json have no answers.*scored"):
            read()


YES = ["yes"] * 10


@pytest.mark.parametrize(
    ("questions", "annotations", "message"),
    [
        (
            [question(1, 9), question(2, 9)],
            [annotation(1, 9, *YES)],
            r"question 2 \(entry 1 of 'questions'\) has no ann",
        ),
        ([question(1, 9), question(1, 8)], [], r"questions\.json: entry 1 of 'questions'.* id 1 occurs twice"),
        ([question(1, 9)], [annotation(1, 9, *YES)] * 2, r"annotations\.json: entry 1 of 'annotations'.* id 1 occurs"),
        ([question(1, 9)], [annotation(3, 9, *YES)], r"entry 0 of 'annotations' answers question 3, which .* not ask"),
        ([question(1, 9)], [annotation(1, 9, "yes") | {"answers": []}], r"entry 0 of 'annotations' has no answers"),
        ([question(1, 9)], [{"question_id": 1}], r"annotations\.json cannot be read as .*KeyError: 'answers'"),
        ([{"question_id": 1}], [], r"questions\.json cannot be read as .*KeyError: 'image_id'"),
        ([question([1], 1)], [], r"neither a number nor a text"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, questions: list[Any], annotations: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write(tmp_path, questions, annotations)


def test_a_file_without_a_split_needs_one(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"questions": [question(1, 9)]}))
    with pytest.raises(ConfigError, match=r"data_subtype.*'split'"):
        read_vqav2(str(path), "", str(tmp_path))
    assert names(read_vqav2(str(path), "", str(tmp_path), "train2014")) == ["COCO_train2014_000000000009.jpg"]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 10**9), unique=True, min_size=1, max_size=8), data=st.data())
def test_any_order_of_annotations(ids: list[int], data: st.DataObject, tmp_path: Path) -> None:
    questions = [question(number, number % 3) for number in ids]
    order = data.draw(st.permutations(ids))
    samples = write(tmp_path, questions, [annotation(number, number % 3, *[str(number)] * 10) for number in order])
    assert [samples.answers(index)[0] for index in range(len(ids))] == [str(number) for number in ids]


def test_visual_genome(tmp_path: Path) -> None:
    images = [{"image_id": i, "url": f"https://example.org/VG_100K/{i}.jpg"} for i in (2, 1)]
    answers = [{"qa_id": i, "question": f"Who {i}?", "answer": f"She {i}.", "image_id": 1} for i in (7, 8)]
    (tmp_path / "image_data.json").write_text(json.dumps(images))
    (tmp_path / "qa.json").write_text(json.dumps([{"id": 1, "qas": answers}, {"id": 3, "qas": []}]))
    samples = read_visual_genome_questions(str(tmp_path / "qa.json"), str(tmp_path / "image_data.json"), str(tmp_path))
    assert names(samples) == ["VG_100K/1.jpg"] * 2 and samples.identifier(1) == 8
    assert samples.answers(0) == ["She 7."] and list(samples.main_answers()) == ["she 7", "she 8"]


def lines(path: Path, *objects: dict[str, Any]) -> VqaQuestions:
    (path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in objects))
    return read_vqa_lines(str(path / "own.jsonl"), str(path))


def test_json_lines(tmp_path: Path) -> None:
    base = {"image": "a/b.png", "question": "Which?"}
    samples = lines(tmp_path, base | {"answers": ["x", "y", "y"], "id": "q-1"}, base | {"answer": "z"})
    assert samples.identifier(0) == "q-1" and samples.identifier(1) == 1
    assert list(samples.main_answers()) == ["y", "z"] and len(samples.paths) == 1
    assert not lines(tmp_path, base, base).has_answers


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"id": 3}, {"id": 3}, r"own\.jsonl:2: the question id 3 occurs twice \(first at 1\)"),
        ({"answer": "x"}, {}, r"own\.jsonl:2 has no answers, but the lines before have some"),
        ({}, {"answer": "x"}, r"own\.jsonl:2 has answers, but the lines before have none"),
        ({"answers": "x"}, {}, r"own\.jsonl:1: 'answers' must be a list"),
        ({"answers": []}, {}, r"own\.jsonl:1: 'answers' must be a list"),
        ({"image": 3}, {}, r"own\.jsonl:1 has image='3'"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, first: dict[str, Any], second: dict[str, Any], message: str) -> None:
    base = {"image": "b.png", "question": "Which?"}
    with pytest.raises(ConfigError, match=message):
        lines(tmp_path, base | first, base | second)
