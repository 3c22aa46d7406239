"""Tests that retrieval trains, is evaluated and resumes equally in every layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.fine_tuning import (
    ALL,
    CLIPPED_NORM,
    EPSILON,
    MODEL,
    ONE_PROCESS,
    Layout,
    WriteConfig,
    check_layout_trains_the_same,
    check_metrics_do_not_depend_on_ranks,
    check_planned_shared_memory,
    check_resumes_bit_for_bit,
    figures,
    train_layout,
    write_json,
)
from tests.tasks.retrieval.runs import NUM_VALIDATION, write_config, write_files

COVERING: dict[str, Layout] = {
    "ZeRO-3 on 3 ranks, 2 micro-batches": (3, 3, 2, {}),
    "ZeRO-1, tensor 2, 4 micro-batches": (2, 1, 4, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "ZeRO-1, pipeline 2, 2 micro-batches": (2, 1, 2, {"pipeline_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> WriteConfig:
    files = write_files(tmp_path_factory.mktemp("scenes"))

    def write(folder: Path, layout: Layout = ONE_PROCESS, **training: Any) -> Path:
        _, stage, micro_batches, parallel = layout
        training = {"adam_epsilon": EPSILON, **training}
        path = write_config(files, folder, stage, dict(parallel), micro_batches, model=MODEL, training=training)
        return write_json(folder, json.loads(path.read_text()) | {"gradient_clipping": CLIPPED_NORM})

    return write


@pytest.fixture(scope="module")
def one_process(write: WriteConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_layout(write, tmp_path_factory.mktemp("retrieval") / "one")


@pytest.mark.parametrize("layout", COVERING)
def test_layouts_train_the_same(layout: str, write: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_layout_trains_the_same(write, one_process, tmp_path / "run", COVERING[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ALL)
def test_all_layouts_train_the_same(layout: str, write: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_layout_trains_the_same(write, one_process, tmp_path / "run", ALL[layout])


def test_it_resumes_bit_for_bit(write: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_resumes_bit_for_bit(write, one_process, tmp_path)


def test_the_planner_counts_the_images_of_prefetched_steps(write: WriteConfig, tmp_path: Path) -> None:
    check_planned_shared_memory(write, tmp_path)


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
