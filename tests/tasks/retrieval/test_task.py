"""Checks that retrieval trains, is evaluated and resumes alike in every layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.tasks.retrieval.runs import NUM_VALIDATION, records, train, write_config, write_files

LAYOUTS: dict[str, tuple[int, int, dict[str, Any], int]] = {
    "ZeRO-3 on 3 ranks": (3, 3, {}, 2),
    "tensor 2": (2, 1, {"tensor_parallel_size": 2, "sequence_parallel": True}, 4),
    "pipeline 2": (2, 1, {"pipeline_parallel_size": 2}, 2),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def one_process(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    assert run_ranks(train, 1, str(write_config(files, folder))) == [0]
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_and_score_the_same(layout: str, files: Path, one_process: Path, tmp_path: Path) -> None:
    num_ranks, zero_stage, parallel, accumulation = LAYOUTS[layout]
    config = write_config(files, tmp_path, zero_stage, parallel, accumulation)
    assert run_ranks(train, num_ranks, str(config)) == [0] * num_ranks
    for ours, theirs in zip(records(tmp_path, "train"), records(one_process, "train"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5) and len(ours) == 6
    found, expected = records(tmp_path, "validation"), records(one_process, "validation")
    # With equal weights identical to the digit, although 13 images divide over no number of ranks.
    assert found[0] == expected[0] and len(found) == len(expected) == 3
    assert found[-1] == pytest.approx(expected[-1], abs=0.05)  # weights differ by rounding, so ranks may


def test_resumes_bit_for_bit(files: Path, one_process: Path, tmp_path: Path) -> None:
    config = write_config(files, tmp_path)
    shutil.copytree(one_process / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert run_ranks(train, 1, str(config)) == [0]
    for kind in ("train", "validation"):
        assert records(tmp_path, kind) == records(one_process, kind)


def test_every_image_and_caption_is_scored_once(one_process: Path) -> None:
    metrics = records(one_process, "validation")[-1]
    content = json.loads((one_process / "run" / "validation" / "retrieval.json").read_text())
    assert content["metrics"] == metrics
    assert len(content["images"]) == NUM_VALIDATION and len(content["captions"]) == 5 * NUM_VALIDATION
    assert len({entry["image"] for entry in content["images"]}) == NUM_VALIDATION
    ranks = [entry["rank"] for entry in content["images"]]
    assert sum(rank <= 5 for rank in ranks) / NUM_VALIDATION == metrics["text_recall@5"]
    for entry in content["images"]:
        right = [place for place, found in enumerate(entry["found"], 1) if found["is_right"]]
        assert len(entry["found"]) == 10 and (not right or entry["rank"] >= right[0] or entry["rank"] > 10)
    page = (one_process / "run" / "validation" / "retrieval.html").read_text()
    assert page.count("class='sample") + page.count('class="sample') == 6 and "Images for: " in page
