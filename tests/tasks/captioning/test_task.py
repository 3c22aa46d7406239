"""Trains captioning in every layout alike, and writes captions at its end."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.sample_data.write_scenes import write_scenes
from tests.tasks.runs import LAYOUTS, figures, train_on_ranks, write_config

NAMES = ("words", "word_accuracy")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, num_train=8, num_validation=5, size=32)
    return folder


def captioning_config(folder: Path, scenes: Path, tokenizer: str, **changes: Any) -> Path:
    source = {"path": str(scenes / "captions.json"), "format": "karpathy", "images": str(scenes)}
    pairs = {"train": [source | {"split": "train"}], "validation": [source | {"split": "val"}], "samples_per_step": 8}
    task = {
        "name": "captioning",
        "dropped_share": 0.2,
        "drop_after_steps": 2,
        "max_length": 8,
        "official_scores": False,
    }
    return write_config(folder, task, pairs, tokenizer, **changes)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, scenes: Path, tokenizer_files: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("captioning") / "one"
    train_on_ranks(captioning_config(folder, scenes, tokenizer_files["text"]))
    return folder


def test_it_trains_and_writes_captions(one_process: Path, scenes: Path) -> None:
    found = figures(one_process, *NAMES)
    assert len(found) == 7  # four steps; evaluations before, between and at the end
    assert set(found[0]) == set(NAMES)
    # The loss of tokens is near that of a guess, log(310) minus the entropy of the smoothed labels, before training.
    assert 3 < found[0]["words"] < 6
    results = one_process / "run" / "validation"
    images = [
        image for image in json.loads((scenes / "captions.json").read_text())["images"] if image["split"] == "val"
    ]
    captions = json.loads((results / "captions.json").read_text())
    assert [caption["image_id"] for caption in captions] == [image["cocoid"] for image in images]
    assert (results / "captions.html").read_text().count("<img") == 5
    summary = json.loads((one_process / "run" / "summary.json").read_text())
    assert {*NAMES, "ended", "exact_match"} <= set(summary["validation"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_the_same(
    layout: str, one_process: Path, scenes: Path, tokenizer_files: dict[str, str], tmp_path: Path
) -> None:
    config = captioning_config(tmp_path / "run", scenes, tokenizer_files["text"], layout=LAYOUTS[layout])
    train_on_ranks(config, LAYOUTS[layout][0])
    found, expected = figures(tmp_path / "run", *NAMES), figures(one_process, *NAMES)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)  # catches tokens dropped per rank or per micro-batch
    accuracies = [record.get("word_accuracy") for record in found if "loss" not in record]
    assert accuracies == [record.get("word_accuracy") for record in expected if "loss" not in record]  # to the digit
    captions = tmp_path / "run" / "run" / "validation" / "captions.json"
    is_whole = LAYOUTS[layout][1] < 3 and not LAYOUTS[layout][3]
    assert captions.exists() == is_whole
    if is_whole:
        assert captions.read_text() == (one_process / "run" / "validation" / "captions.json").read_text()


@pytest.mark.slow
def test_resumes_bit_for_bit(one_process: Path, scenes: Path, tokenizer_files: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    config = captioning_config(folder, scenes, tokenizer_files["text"])
    shutil.copytree(one_process / "run", folder / "run")
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000004")
    train_on_ranks(config)
    assert figures(folder, *NAMES) == figures(one_process, *NAMES)  # catches a resumed run that forgets to drop tokens
