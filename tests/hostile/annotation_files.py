"""Generates hostile annotation files: captions, questions, statements and classes of images."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beit3_ds.data.images.annotated import AnnotatedImages
from beit3_ds.data.images.annotations import (
    read_coco_captions,
    read_sbu_captions,
    read_visual_genome,
)
from beit3_ds.data.images.caption_files import read_captions
from beit3_ds.data.images.captioned import CaptionedImages
from beit3_ds.data.sources import check_no_image_is_missing, count_missing_images
from beit3_ds.inference.requests import read_questions
from beit3_ds.tasks.imagenet.classes import ClassList, ImageClass
from beit3_ds.tasks.imagenet.files import read_class_lines
from beit3_ds.tasks.nlvr2.files import Statements, read_nlvr2, read_statement_lines
from beit3_ds.tasks.vqa.answers import AnswerVocabulary
from beit3_ds.tasks.vqa.files import VqaQuestions, read_visual_genome_questions, read_vqa_lines, read_vqav2
from tests.hostile.corpus import HostileKind, read_records
from tests.hostile.image_files import PNG
from tests.hostile.values import changed_json_text, replace_file

Write = Callable[[Path, random.Random], Path]
NAMES = ("1.png", "2.png", "COCO_val2014_000000000001.png", "COCO_val2014_000000000001.jpg")


def write_images(folder: Path) -> Path:
    inside = folder / "images"
    for name in (
        *NAMES,
        "val2014/1.png",
        f"val2014/{NAMES[3]}",
        "VG_100K/1.jpg",
        "VG_100K/2.jpg",
        "dev-1-0-img0.png",
        "dev-1-0-img1.png",
    ):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_bytes(PNG)
    return folder


# JSON files: the whole content of each kind.

COCO = {
    "info": {"year": 2014},
    "images": [{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": "2.png"}],
    "annotations": [{"id": 7, "image_id": 1, "caption": "a dog"}, {"id": 8, "image_id": 2, "caption": "a cat"}],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filepath": "val2014", "filename": "1.png", "split": split, "cocoid": number, "sentences": [{"raw": "a dog"}]}
        for number, split in enumerate(("test", "train", "restval", "val"))
    ],
}
GENOME_IMAGES = [{"image_id": 1, "url": "https://x/VG_100K/1.jpg"}, {"image_id": 2, "url": "https://x/VG_100K/2.jpg"}]
GENOME_REGIONS = [{"id": 1, "regions": [{"phrase": "a dog"}, {"phrase": "a cat"}]}]
GENOME_QUESTIONS = [{"id": 1, "qas": [{"qa_id": 5, "question": "what is it?", "answer": "a dog"}]}]
SBU = {"captions": ["a dog", "a cat", "a bird"], "image_urls": ["u", "v", "w"]}
VQA_QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [{"question_id": 10, "image_id": 1, "question": "what is it?"}],
}
VQA_ANSWERS = {
    "annotations": [
        {
            "question_id": 10,
            "multiple_choice_answer": "dog",
            "question_type": "what",
            "answer_type": "other",
            "answers": [{"answer": "dog"}, {"answer": "cat"}],
        }
    ]
}
CAPTION_LINES = [{"image": "1.png", "captions": ["a dog"], "id": 1}, {"image": "2.png", "caption": "a cat", "id": 2}]
VQA_LINES = [
    {"image": "1.png", "question": "what?", "answers": ["dog"], "id": 1, "question_type": "what"},
    {"image": "2.png", "question": "who?", "answer": "cat", "id": 2},
]
NLVR2_LINES = [{"identifier": "dev-1-0-0", "sentence": "two dogs", "label": "True", "directory": "."}]
STATEMENT_LINES = [{"left": "1.png", "right": "2.png", "sentence": "two dogs", "label": True, "id": 1, "group": "g"}]
CLASS_LINES = [{"image": "1.png", "class": "dog"}, {"image": "2.png", "class": "cat"}]
ANSWER_LINES = [{"answer": "dog", "label": 0}, {"answer": "cat", "label": 1}]
QUESTION_LINES = [{"image": "images/1.png", "question": "what?", "id": 1}]
CLASSES = ClassList([ImageClass("dog", "a dog"), ImageClass("cat", "a cat")])


def json_writer(name: str, content: Any, *others: tuple[str, Any]) -> Write:
    """Returns a function that writes JSON files, one of which is hostile: `name` or one of `others`."""

    def write(folder: Path, draw: random.Random) -> Path:
        contents = {name: content, **dict(others)}
        for file, value in contents.items():
            (folder / file).write_text(json.dumps(value))
        changed = folder / draw.choice(list(contents))
        if draw.random() < 0.25:
            replace_file(changed, draw)
        else:
            changed.write_bytes(changed_json_text(contents[changed.name], draw))
        return write_images(folder) / name

    return write


def _lines_writer(name: str, lines: list[Any]) -> Write:
    def write(folder: Path, draw: random.Random) -> Path:
        texts = [json.dumps(line).encode() for line in lines]
        texts[draw.randrange(len(texts))] = changed_json_text(draw.choice(lines), draw)
        path = folder / name
        path.write_bytes(draw.choice([b"\n", b"\r\n", b"\n\n \n", b"\0\n"]).join(texts))
        if draw.random() < 0.25:
            replace_file(path, draw)
        return write_images(folder) / name

    return write


def read_images(samples: AnnotatedImages) -> None:
    count_missing_images(samples, 16)
    check_no_image_is_missing(samples)
    list(samples.files())
    read_records(len(samples), samples.name, samples.image, samples.caption, samples.pair)


def _read_captions(samples: CaptionedImages) -> None:
    read_images(samples)
    images = samples.each_image()
    read_records(len(images), images.name, images.identifier, images.references)


def _read_questions(samples: VqaQuestions) -> None:
    read_images(samples)
    read_records(len(samples), samples.identifier, samples.types, samples.answers)
    AnswerVocabulary.build(samples.main_answers(), 1)


def _read_statements(samples: Statements) -> None:
    samples.check_has_labels()
    samples.check_no_image_is_missing()
    for side in (0, 1):
        read_records(len(samples), samples.name, lambda index, side=side: samples.image(index, side))  # type: ignore[misc]


def images_beside(path: Path) -> str:
    return str(path.parent / "images")


ANNOTATIONS = {
    "coco": HostileKind(
        json_writer("captions.json", COCO), lambda p: read_images(read_coco_captions(str(p), images_beside(p)))
    ),
    "visual genome": HostileKind(
        json_writer("region_descriptions.json", GENOME_REGIONS, ("image_data.json", GENOME_IMAGES)),
        lambda p: read_images(read_visual_genome(str(p), str(p.parent / "image_data.json"), images_beside(p))),
    ),
    "sbu json": HostileKind(
        json_writer("captions.json", SBU), lambda p: read_images(read_sbu_captions(str(p), images_beside(p)))
    ),
    "karpathy": HostileKind(
        json_writer("dataset_coco.json", KARPATHY),
        lambda p: _read_captions(read_captions(str(p), images_beside(p), "karpathy", "train")),
    ),
    "coco images": HostileKind(
        json_writer("captions.json", COCO),
        lambda p: _read_captions(read_captions(str(p), images_beside(p), "coco_images")),
    ),
    "caption lines": HostileKind(
        _lines_writer("captions.jsonl", CAPTION_LINES),
        lambda p: _read_captions(read_captions(str(p), images_beside(p), "caption_lines")),
    ),
    "vqav2": HostileKind(
        json_writer("questions.json", VQA_QUESTIONS, ("answers.json", VQA_ANSWERS)),
        lambda p: _read_questions(read_vqav2(str(p), str(p.parent / "answers.json"), images_beside(p))),
    ),
    "vqa of visual genome": HostileKind(
        json_writer("question_answers.json", GENOME_QUESTIONS, ("image_data.json", GENOME_IMAGES)),
        lambda p: _read_questions(
            read_visual_genome_questions(str(p), str(p.parent / "image_data.json"), images_beside(p))
        ),
    ),
    "vqa lines": HostileKind(
        _lines_writer("questions.jsonl", VQA_LINES), lambda p: _read_questions(read_vqa_lines(str(p), images_beside(p)))
    ),
    "answers": HostileKind(_lines_writer("answers.jsonl", ANSWER_LINES), AnswerVocabulary.load),
    "nlvr2": HostileKind(
        _lines_writer("dev.json", NLVR2_LINES), lambda p: _read_statements(read_nlvr2(str(p), images_beside(p)))
    ),
    "statement lines": HostileKind(
        _lines_writer("dev.jsonl", STATEMENT_LINES),
        lambda p: _read_statements(read_statement_lines(str(p), images_beside(p))),
    ),
    "class lines": HostileKind(
        _lines_writer("train.jsonl", CLASS_LINES),
        lambda p: read_class_lines(str(p), images_beside(p), CLASSES),
    ),
    "questions of a command": HostileKind(_lines_writer("questions.jsonl", QUESTION_LINES), read_questions),
}
