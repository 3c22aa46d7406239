"""Checks that retrieval trains, is evaluated and resumes alike in every layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.fine_tuning import (
    ALL,
    ONE_PROCESS,
    Layout,
    WriteConfig,
    check_metrics_do_not_depend_on_ranks,
    check_resumes_bit_for_bit,
    check_same_gradients,
    figures,
    train_layout,
)
from tests.tasks.retrieval.runs import NUM_VALIDATION, write_config, write_files

COVERING: dict[str, Layout] = {
    "ZeRO-3 on 3 ranks, 2 micro-batches": (3, 3, 2, {}),
    "ZeRO-1, tensor 2, 4 micro-batches": (2, 1, 4, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "ZeRO-1, pipeline 2, 2 micro-batches": (2, 1, 2, {"pipeline_parallel_size": 2}),
}
POSSIBLE = {name: layout for name, layout in ALL.items() if not ("pipeline" in name and layout[2] < 2)}


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> WriteConfig:
    files = write_files(tmp_path_factory.mktemp("scenes"))

    def write(folder: Path, layout: Layout = ONE_PROCESS, **training: Any) -> Path:
        _, stage, micro_batches, parallel = layout
        return write_config(files, folder, stage, dict(parallel), micro_batches, training=training)

    return write


@pytest.fixture(scope="module")
def one_process(write: WriteConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_layout(write, tmp_path_factory.mktemp("retrieval") / "one")


def check_layout(write: WriteConfig, one_process: Path, folder: Path, layout: Layout) -> None:
    """Compares the gradients of the first step, losses, gradient norms and scores with one process.

    Gradients of a contrastive loss are differences of nearly equal features, which doubles the share of rounding.
    """
    train_layout(write, folder, layout)
    check_same_gradients(folder, one_process, bound=2e-5)
    found, expected = figures(folder, "train"), figures(one_process, "train")
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        names = ("loss", "image_to_text", "text_to_image", "grad_norm")
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=2e-5)
    scores, expected_scores = figures(folder, "validation"), figures(one_process, "validation")
    assert scores[0] == expected_scores[0] and len(scores) == 3  # equal weights
    assert scores[-1] == pytest.approx(expected_scores[-1], abs=0.05)  # rounding may exchange two neighbours


@pytest.mark.parametrize("layout", COVERING)
def test_layouts_train_and_score_the_same(layout: str, write: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_layout(write, one_process, tmp_path / "run", COVERING[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", POSSIBLE)
def test_all_layouts_train_the_same(layout: str, write: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_layout(write, one_process, tmp_path / "run", POSSIBLE[layout])


def test_it_resumes_bit_for_bit(write: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_resumes_bit_for_bit(write, one_process, tmp_path)


def test_metrics_do_not_depend_on_the_ranks(write: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    metrics = check_metrics_do_not_depend_on_ranks(write, one_process, tmp_path)
    assert {f"{name}@{level}" for name in ("text_recall", "image_recall") for level in (1, 5, 10)} < set(metrics)


def test_every_image_and_caption_is_scored_once(one_process: Path) -> None:
    metrics = figures(one_process, "validation")[-1]
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
