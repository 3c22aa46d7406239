"""Tests (slow) that images decide the answers to questions.

The data are drawn scenes, and the "what" questions of easy-VQA.
"""

import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import easy_vqa
import pytest

from beit3_ds.sample_data.scenes import ask_questions, draw_image, draw_scene
from tests.tasks.learning import SEEDS, evaluate_weights, interval, learning_mapping, train_mapping, train_words

NUM_TRAIN, NUM_VALIDATION = 3000, 300  # scenes, of two questions each
STEPS = 900


class Measured(NamedTuple):
    """Holds percentages of questions that are answered correctly."""

    own: float
    """Percentage of a trained model."""
    other: float
    """Percentage of the same model when each question gets the image of another question."""


def write_questions(folder: Path, split: str, lines: Sequence[dict[str, Any]]) -> None:
    """Writes questions, and `SPLIT-swapped.jsonl` with a randomly drawn image for each question."""
    images = [line["image"] for line in lines]
    random.Random(split).shuffle(images)
    swapped = [line | {"image": image} for line, image in zip(lines, images, strict=True)]
    for name, content in ((split, lines), (f"{split}-swapped", swapped)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))


def text_alone(folder: Path) -> float:
    """Returns the percentage of correct answers when each question gets its most frequent training answer.

    No text-only model can do better except by chance, because each question has hundreds of training answers.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in read_lines(folder, "train"):
        counts[line["question"]][line["answer"]] += 1
    guesses = {question: answers.most_common(1)[0][0] for question, answers in counts.items()}
    lines = read_lines(folder, "validation")
    return 100 * sum(guesses.get(line["question"]) == line["answer"] for line in lines) / len(lines)


def read_lines(folder: Path, split: str) -> list[dict[str, Any]]:
    return list(map(json.loads, (folder / f"{split}.jsonl").read_text().splitlines()))


def measure(folder: Path, files: Path, seed: int) -> Measured:
    """Trains on the questions in a folder and answers its validation split; returns the percentages."""
    lines = read_lines(files, "train")
    words = train_words(sorted({line["question"] for line in lines}), folder.with_suffix(".spm"), 36)

    def mapping(validation: str) -> dict[str, Any]:
        pairs: dict[str, Any] = {
            split: [{"path": str(files / f"{name}.jsonl"), "format": "vqa_lines", "images": str(files)}]
            for split, name in (("train", "train"), ("validation", validation))
        }
        task = {"name": "vqa", "num_answers": len({line["answer"] for line in lines})}
        found = learning_mapping(folder, task, pairs | {"samples_per_step": 64}, words, seed, STEPS)
        own = found["beit3_ds"]
        own["model"] |= {"num_layers": 3, "sub_layernorm": True, "initial_embedding_std": 0.4}
        own["training"] |= {"learning_rate": 1e-3}
        return found

    own = train_mapping(folder, mapping("validation"))["accuracy"]
    other = evaluate_weights(folder.with_name(f"{folder.name}-swapped"), mapping("validation-swapped"), folder / "run")
    return Measured(own, other["accuracy"])


def check_answers_need_the_image(folder: Path, files: Path) -> list[Measured]:
    measured = [measure(folder / str(seed), files, seed) for seed in SEEDS]
    blind = text_alone(files)
    low, high = interval([found.own - max(found.other, blind) for found in measured])
    print(f"\n{measured}, text alone {blind:.1f}; difference to the better control {low:.1f} to {high:.1f}")
    assert low > 0
    return measured


@pytest.mark.slow
def test_questions_about_drawn_scenes(tmp_path: Path) -> None:
    """Asks for the color of a shape and for the shape of a color, in scenes of two objects."""
    for split, count in (("train", NUM_TRAIN), ("validation", NUM_VALIDATION)):
        rng = random.Random(split)
        lines: list[dict[str, Any]] = []
        (tmp_path / split).mkdir()
        for number in range(count):
            scene, image = draw_scene(rng, 2), f"{split}/{number:06}.png"
            draw_image(scene, rng, 32).save(tmp_path / image)
            questions = [found for found in ask_questions(scene, rng) if found.question.startswith("what ")]
            lines += [{"id": f"{number}-{i}", "image": image, **found._asdict()} for i, found in enumerate(questions)]
        write_questions(tmp_path, split, lines)
    measured = check_answers_need_the_image(tmp_path / "runs", tmp_path)
    assert min(found.own for found in measured) > 60


@pytest.mark.slow
def test_what_questions_of_easy_vqa(tmp_path: Path) -> None:
    """Leaves out the yes-or-no questions of easy-VQA, because most of them can be answered without the image."""
    for split, questions, images in (
        ("train", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
        ("validation", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    ):
        shutil.copytree(Path(images[0]).parent, tmp_path / split)
        lines = [
            {"id": number, "image": f"{split}/{Path(images[image]).name}", "question": question, "answer": answer}
            for number, (question, answer, image) in enumerate(zip(*questions, strict=True))
            if question.startswith("what ")
        ]
        write_questions(tmp_path, split, lines)
    check_answers_need_the_image(tmp_path / "runs", tmp_path)
