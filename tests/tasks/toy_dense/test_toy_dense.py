"""Tests that a task on images of any size trains equally in every layout, and resumes."""

from pathlib import Path
from typing import Any

import pytest

from tests.built_once import build_once
from tests.tasks.fine_tuning import (
    ALL,
    ONE_PROCESS,
    Layout,
    check_layout_trains_the_same,
    check_resumes_bit_for_bit,
    run_mapping,
    train_layout,
    write_json,
)

COVERING: dict[str, Layout] = {
    "ZeRO-3 on 2 ranks, 2 micro-batches": (2, 3, 2, {}),
    "ZeRO-2, tensor 2": (2, 2, 1, {"tensor_parallel_size": 2}),
    "ZeRO-3, tensor 2, 2 micro-batches": (2, 3, 2, {"tensor_parallel_size": 2}),
    "ZeRO-1, tensor 2, sequence parallel, an image per micro-batch": (
        *(2, 1, 8),
        {"tensor_parallel_size": 2, "sequence_parallel": True},
    ),
    "ZeRO-1, pipeline 2, 4 micro-batches": (2, 1, 4, {"pipeline_parallel_size": 2}),
}


def write_config(folder: Path, layout: Layout = ONE_PROCESS, **training: Any) -> Path:
    mapping = run_mapping(folder, layout, {"name": "tests.tasks.toy_dense"}, **training)
    own = mapping["beit3_ds"]
    own["model"] |= {
        "image_size": 32,
        "patch_size": 8,
        "inputs": ["images"],
        "dense": {"window_size": 2, "global_blocks": [1], "relative_positions": True},
    }
    images = small_images()
    own["data"] |= {"images": {**images, "samples_per_step": 8}}
    own["tokenizers"] = {}
    own["training"]["eval_samples"] = 8  # instead of all images of the sample data
    return write_json(folder, mapping)


def small_images() -> dict[str, Any]:
    from tests.run_config import quickstart_mapping

    images: dict[str, Any] = quickstart_mapping()["beit3_ds"]["data"]["images"]
    return images


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_once(tmp_path_factory, "toy_dense", lambda folder: train_layout(write_config, folder))


@pytest.mark.parametrize("layout", COVERING)
def test_layouts_train_the_same(layout: str, one_process: Path, tmp_path: Path) -> None:
    check_layout_trains_the_same(write_config, one_process, tmp_path, COVERING[layout])


def test_resumes_bit_for_bit(one_process: Path, tmp_path: Path) -> None:
    check_resumes_bit_for_bit(write_config, one_process, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ALL)
def test_all_layouts_train_the_same(layout: str, one_process: Path, tmp_path: Path) -> None:
    check_layout_trains_the_same(write_config, one_process, tmp_path, ALL[layout])
