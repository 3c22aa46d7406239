"""Tests (slow) that generated captions describe their own image and not another one, and end by themselves."""

import json
import random
from pathlib import Path

import pytest

from beit3_ds.sample_data.scenes import Scene, draw_image, draw_scene
from beit3_ds.sample_data.write_scenes import write_scenes
from tests.tasks.learning import SEEDS, interval, learning_mapping, train_mapping, train_words

NUM_TRAIN, NUM_VALIDATION, STEPS = 3000, 200, 200


def write_captions(folder: Path, split: str, count: int) -> list[str]:
    """Writes scenes of one to three squares with one caption each; a caption names the colors in reading order."""
    rng = random.Random(split)
    captions, lines = [], []
    for number in range(count):
        scene = Scene(tuple(found._replace(shape="square") for found in draw_scene(rng).objects))
        name = f"{split}/{number:06}.png"
        (folder / split).mkdir(parents=True, exist_ok=True)
        draw_image(scene, rng, 32).save(folder / name)
        captions.append(scene.caption())
        lines.append(json.dumps({"id": number, "image": name, "caption": captions[-1]}))
    (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return captions


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("squares")
    write_captions(folder, "train", NUM_TRAIN)
    write_scenes(folder / "words", num_train=300, num_validation=1, size=16)
    return folder, write_captions(folder, "validation", NUM_VALIDATION)


def measure(folder: Path, files: Path, truths: list[str], seed: int) -> tuple[float, float, float]:
    """Trains and generates captions; returns three shares of the captions.

    Returns:
        Shares that equal the caption of their own image, that equal the caption of the next image, and that end.
    """
    pairs = {
        split: [{"path": str(files / f"{split}.jsonl"), "format": "caption_lines", "images": str(files)}]
        for split in ("train", "validation")
    }
    words = train_words((files / "words" / "text.txt").read_text().splitlines(), folder.with_suffix(".spm"), 64)
    task = {"name": "captioning", "dropped_share": 0.0, "official_scores": False, "max_length": 24}
    mapping = learning_mapping(folder, task, pairs | {"samples_per_step": 64}, words, seed, STEPS)
    metrics = train_mapping(folder, mapping)
    written = json.loads((folder / "run" / "validation" / "captions.json").read_text())
    captions = [entry["caption"] for entry in written]
    shares = [
        sum(caption == truth for caption, truth in zip(captions, others, strict=True)) / len(truths)
        for others in (truths, [*truths[1:], truths[0]])
    ]
    assert shares[0] == pytest.approx(metrics["exact_match"])
    return shares[0], shares[1], metrics["ended"]


@pytest.mark.slow
def test_captions_are_those_of_their_image(squares: tuple[Path, list[str]], tmp_path: Path) -> None:
    files, truths = squares
    measured = [measure(tmp_path / str(seed), files, truths, seed) for seed in SEEDS]
    low, high = interval([right - wrong for right, wrong, _ in measured])
    print(f"exact match, next image's, ended: {measured}; difference {low:.3f} to {high:.3f}")
    assert low > 0
    assert min(ended for _, _, ended in measured) > 0.95
