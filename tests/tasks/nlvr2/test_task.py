"""Trains NLVR2 in every layout alike, and writes what people and NLVR2's own script read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.sample_data.write_scenes import write_scenes
from tests.tasks.runs import LAYOUTS, figures, train_on_ranks, write_config

NAMES = ("statement", "accuracy", "consistency")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, num_train=8, num_validation=5, size=32)
    return folder


def nlvr2_config(folder: Path, scenes: Path, tokenizer: str, **changes: Any) -> Path:
    sources = {
        split: [{"path": str(scenes / f"statements-{split}.jsonl"), "format": "statement_lines", "images": str(scenes)}]
        for split in ("train", "validation")
    }
    return write_config(folder, {"name": "nlvr2"}, {**sources, "samples_per_step": 8}, tokenizer, **changes)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, scenes: Path, tokenizer_files: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("nlvr2") / "one"
    train_on_ranks(nlvr2_config(folder, scenes, tokenizer_files["text"]))
    return folder


def test_it_trains_and_evaluates(one_process: Path) -> None:
    found = figures(one_process, *NAMES)
    assert len(found) == 7  # four steps; evaluations before, between and at the end
    assert set(found[0]) == set(NAMES) and found[0]["accuracy"] * 10 == pytest.approx(round(found[0]["accuracy"] * 10))
    results = one_process / "run" / "validation"
    lines = (results / "predictions.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"{group}-{number}" for group in range(5) for number in (0, 1)]
    assert {line.split(",")[1] for line in lines} <= {"True", "False"}
    assert (results / "statements.html").read_text().count("<img") == 20
    summary = json.loads((one_process / "run" / "summary.json").read_text())
    assert set(summary["validation"]) == set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_the_same(
    layout: str, one_process: Path, scenes: Path, tokenizer_files: dict[str, str], tmp_path: Path
) -> None:
    config = nlvr2_config(tmp_path / "run", scenes, tokenizer_files["text"], layout=LAYOUTS[layout])
    train_on_ranks(config, LAYOUTS[layout][0])
    found, expected = figures(tmp_path / "run", *NAMES), figures(one_process, *NAMES)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    for name in ("accuracy", "consistency"):  # to the digit
        assert [record.get(name) for record in found] == [record.get(name) for record in expected]


@pytest.mark.slow
def test_resumes_bit_for_bit(one_process: Path, scenes: Path, tokenizer_files: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    config = nlvr2_config(folder, scenes, tokenizer_files["text"])
    shutil.copytree(one_process / "run", folder / "run")
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000004")
    train_on_ranks(config)
    assert figures(folder, *NAMES) == figures(one_process, *NAMES)
