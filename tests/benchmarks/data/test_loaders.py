"""Tests that all loaders in the loader benchmark do the same work, and that its ratios are not inverted."""

import json
from pathlib import Path

import pytest
import torch

from beit3_ds.benchmarks.data import loaders as bench
from beit3_ds.config import ConfigError

pytest.importorskip("webdataset")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_NUM_IMAGES": 4, "_BATCH": 2, "_ROUNDS": 2, "_WIDTH": 100, "_HEIGHT": 80}.items():
        monkeypatch.setattr(bench, name, value)


@pytest.mark.usefixtures("small")
def test_all_loaders_make_two_views_and_a_mask(tmp_path: Path) -> None:
    bench._write_images(tmp_path)
    batch, views = next(bench._ours(str(tmp_path)))
    batches = [(*views, batch.patch_mask)]
    batches += [next(bench._webdataset(str(tmp_path))), next(bench._image_folder(str(tmp_path)))[0]]
    for first, second, mask in batches:
        # catches a baseline that does less, or other pixels than [-1, 1]
        assert first.shape == second.shape == (2, 3, 224, 224)
        assert -1 <= first.min() < -0.2 < 0.2 < first.max() <= 1
        assert torch.as_tensor(mask).sum() == 2 * 78


@pytest.mark.usefixtures("small")
def test_figures_are_written(tmp_path: Path) -> None:
    table = bench.benchmark_data(str(tmp_path / "data.json"))
    result = json.loads((tmp_path / "data.json").read_text())
    assert [row["loader"] for row in result["rows"]] == ["beit3_ds", "webdataset", "torchvision", "decode alone"]
    assert set(result["summary"]) == {"ratio_webdataset", "ratio_torchvision", "decode_limit_share"}
    assert 0 < result["summary"]["decode_limit_share"] < 1  # catches a ratio upside down
    assert all(row["loader"] in table for row in result["rows"])


@pytest.mark.usefixtures("small")
def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent/data\.json: cannot be written"):
        bench.benchmark_data(str(tmp_path / "absent" / "data.json"))
