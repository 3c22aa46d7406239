"""Tests segmentation runs: layouts, any number of ranks, resuming, result files and refused settings."""

import functools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit3_ds.config import ConfigError, RunConfig, load_run_config
from beit3_ds.tasks import build_task
from tests.tasks.fine_tuning import (
    ALL,
    COVERING,
    Layout,
    check_layout_trains_the_same,
    check_metrics_do_not_depend_on_ranks,
    check_resumes_bit_for_bit,
    figures,
    train_layout,
)
from tests.tasks.segmentation.label_files import write_config, write_dataset

WITHOUT_ADAPTER = {"adapter": None}
_LAYOUTS = {name: layout for name, layout in COVERING.items() if "pipeline" not in name}
_ALL = {name: layout for name, layout in ALL.items() if "pipeline" not in name}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return train_layout(functools.partial(write_config, data=data), tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("name", _LAYOUTS)
def test_layouts_train_the_same(name: str, one_process: Path, data: Path, tmp_path: Path) -> None:
    check_layout_trains_the_same(functools.partial(write_config, data=data), one_process, tmp_path, _LAYOUTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(_ALL))
def test_all_layouts_train_the_same(name: str, one_process: Path, data: Path, tmp_path: Path) -> None:
    check_layout_trains_the_same(functools.partial(write_config, data=data), one_process, tmp_path, _ALL[name])


def test_a_trunk_without_adapter_trains_the_same(data: Path, tmp_path: Path) -> None:
    def write(folder: Path, layout: Layout = (1, 0, 1, {}), **training: object) -> Path:
        return write_config(folder, layout, data=data, task=WITHOUT_ADAPTER, **training)

    expected = train_layout(write, tmp_path / "one")
    check_layout_trains_the_same(write, expected, tmp_path / "two", (2, 3, 2, {}))


def test_resumes_bit_for_bit(one_process: Path, data: Path, tmp_path: Path) -> None:
    check_resumes_bit_for_bit(functools.partial(write_config, data=data), one_process, tmp_path)


def test_result_files_do_not_depend_on_ranks(one_process: Path, data: Path, tmp_path: Path) -> None:
    metrics = check_metrics_do_not_depend_on_ranks(functools.partial(write_config, data=data), one_process, tmp_path)
    assert metrics["images"] == 5
    last = figures(one_process, "validation")[-1]
    assert metrics["mIoU"] == last["mIoU"]
    predictions = sorted((tmp_path / "1" / "out" / "predictions").iterdir())
    for path in predictions:
        values = np.array(Image.open(path))
        truth = Image.open(data / "annotations" / "validation" / path.name)
        assert values.shape == truth.size[::-1] and values.min() >= 1 and values.max() <= 9
    assert len(predictions) == 5


def _load(data: Path, folder: Path, *changes: str) -> RunConfig:
    return load_run_config(write_config(folder, data=data), list(changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["parallel.pipeline_parallel_size=2", "gradient_accumulation_steps=2"], "does not support pipelines"),
        (["model.final_norm=true"], "final_norm=true, but the adapter"),
        (["model.dense=null"], 'needs a section "dense"'),
        (["model.image_size=48"], "multiple of 32"),
        (["task.adapter.num_heads=3"], "num_heads=3 does not divide"),
        (["task.scales=[]"], "name at least one scale|Name at least one scale"),
    ],
)
def test_what_does_not_fit_is_refused(changes: list[str], message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        build_task(_load(data, tmp_path, *changes))
