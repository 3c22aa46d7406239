"""Tests (slow) that the images decide whether a statement about two images is judged true."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.sample_data.scenes import Scene, draw_image, draw_scene
from beit3_ds.sample_data.write_scenes import write_scenes
from tests.tasks.learning import SEEDS, evaluate_weights, interval, learning_mapping, train_mapping, train_words

NUM_TRAIN, NUM_VALIDATION, STEPS = 1500, 150, 150


def write_statements(folder: Path, split: str, count: int) -> None:
    """Writes statements about the number of squares in two images; each sentence is once true and once false.

    In `SPLIT-swapped.jsonl`, the statements have the images of the next sentence.
    """
    rng = random.Random(split)
    lines: list[dict[str, Any]] = []
    (folder / split).mkdir(parents=True, exist_ok=True)
    for group in range(count):
        side = rng.choice(("left", "right"))
        for label in rng.sample((True, False), 2):
            numbers = {place: rng.randint(1, 3) for place in ("left", "right")}
            numbers[side] = 3 if label else rng.randint(1, 2)
            names = {place: f"{split}/{group:05}-{label}-{place}.png" for place in numbers}
            for place, name in names.items():
                draw_image(draw_squares(rng, numbers[place]), rng, 32).save(folder / name)
            line = {**names, "sentence": f"the {side} image shows three squares", "label": label, "group": group}
            lines.append(line | {"id": len(lines)})
    moved = [lines[(number // 2 * 2 + 2 + rng.randint(0, 1)) % len(lines)] for number in range(len(lines))]
    swapped = [
        line | {side: other[side] for side in ("left", "right")} for line, other in zip(lines, moved, strict=True)
    ]
    for name, content in ((split, lines), (f"{split}-swapped", swapped)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))


def draw_squares(rng: random.Random, count: int) -> Scene:
    return Scene(tuple(found._replace(shape="square") for found in draw_scene(rng, count).objects))


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("squares")
    write_statements(folder, "train", NUM_TRAIN)
    write_statements(folder, "validation", NUM_VALIDATION)
    write_scenes(folder / "words", num_train=300, num_validation=1, size=16)
    return folder


def measure(folder: Path, files: Path, seed: int) -> tuple[float, float]:
    """Trains; returns the accuracy with the right images, and with the images of another statement."""
    words = train_words((files / "words" / "text.txt").read_text().splitlines(), folder.with_suffix(".spm"), 64)

    def mapping(validation: str) -> dict[str, Any]:
        pairs: dict[str, Any] = {
            split: [{"path": str(files / f"{name}.jsonl"), "format": "statement_lines", "images": str(files)}]
            for split, name in (("train", "train"), ("validation", validation))
        }
        found = learning_mapping(folder, {"name": "nlvr2"}, pairs | {"samples_per_step": 64}, words, seed, STEPS)
        own = found["beit3_ds"]
        own["model"] |= {"num_layers": 3, "sub_layernorm": True, "initial_embedding_std": 0.4}
        own["training"] |= {"learning_rate": 1e-3}
        return found

    metrics = train_mapping(folder, mapping("validation"))
    swapped = mapping("validation-swapped")
    control = evaluate_weights(folder.with_name(f"{folder.name}-swapped"), swapped, folder / "run")
    return metrics["accuracy"], control["accuracy"]


@pytest.mark.slow
def test_statements_are_judged_by_their_images(squares: Path, tmp_path: Path) -> None:
    measured = [measure(tmp_path / str(seed), squares, seed) for seed in SEEDS]
    low, high = interval([right - wrong for right, wrong in measured])
    print(f"accuracy, with other images: {measured}; difference {low:.3f} to {high:.3f}")
    assert low > 0
    # The text alone gives 0.5, and a model that does not read which side is asked for 0.833.
    assert min(right for right, _ in measured) > 0.9
