"""Folders of predicted label maps are scored without a model, and bad predictions are named."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit3_ds.cli.main import main
from beit3_ds.sample_data.label_scenes import LABEL_NAMES
from tests.tasks.segmentation.label_files import write_config, write_dataset


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", 1, 3)
    return write_config(tmp_path, data=tmp_path / "data")


@pytest.fixture
def predictions(config: Path) -> Path:
    """Returns a folder of predictions that are right where there is a label, and of class 0 elsewhere."""
    folder = config.parent / "predictions"
    folder.mkdir()
    for path in (config.parent / "data" / "annotations" / "validation").iterdir():
        Image.fromarray(np.maximum(np.array(Image.open(path)), 1)).save(folder / path.name)
    return folder


def _score(config: Path, predictions: Path) -> int:
    return main(["evaluate", str(config), "--results", str(predictions), "--out", str(config.parent / "out")])


def test_right_predictions_score_one_and_wrong_ones_less(config: Path, predictions: Path) -> None:
    out = config.parent / "out"
    assert _score(config, predictions) == 0
    metrics = json.loads((out / "metrics.json").read_text())["metrics"]
    assert metrics == {"mIoU": 1.0, "mean_accuracy": 1.0, "pixel_accuracy": 1.0, "images": 3.0}
    rows = list(csv.DictReader((out / "classes.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == list(LABEL_NAMES) and (out / "confusion.png").stat().st_size > 1000
    path = predictions / "000000.png"
    values = np.array(Image.open(path))
    truth = np.array(Image.open(config.parent / "data" / "annotations" / "validation" / path.name))
    Image.fromarray(np.where(values == 1, np.uint8(2), values)).save(path)
    assert _score(config, predictions) == 0
    found = json.loads((out / "metrics.json").read_text())["metrics"]
    total = sum(int(row["pixels"]) for row in rows)
    assert found["pixel_accuracy"] == pytest.approx(1 - (truth == 1).sum() / total)
    assert (truth == 1).any() == (found["mIoU"] < 1)


def _write(folder: Path, name: str, values: object, size: tuple[int, int] | None = None, mode: str = "L") -> None:
    with Image.open(folder / "000001.png") as image:
        shape = (size or image.size)[::-1]
    Image.fromarray(np.broadcast_to(np.asarray(values, dtype=np.uint8), shape)).convert(mode).save(folder / name)


def _break(folder: Path, fault: str) -> None:
    match fault:
        case "missing":
            (folder / "000001.png").unlink()
        case "other images":
            _write(folder, "stranger.png", 1)
        case "zero":
            _write(folder, "000001.png", 0)
        case "beyond":
            _write(folder, "000001.png", len(LABEL_NAMES) + 1)
        case "size":
            _write(folder, "000001.png", 1, (9, 8))
        case "colours":
            _write(folder, "000001.png", 1, mode="RGB")
        case "cut":
            path = folder / "000001.png"
            path.write_bytes(path.read_bytes()[:60])


FAULTS = {
    "missing": r"predictions lacks 1 of 3 images of the split\. The first is 000001\.png",
    "other images": r"predictions has 1 PNGs of images that the split lacks\. The first is stranger\.png",
    "zero": r"000001\.png: broken prediction: value 0 at row 0, column 0; predictions hold class \+ 1, 1 to 9",
    "beyond": r"000001\.png: broken prediction: value 10 at row 0",
    "size": r"000001\.png: broken prediction: the label map has 9 x 8 pixels, but its image",
    "colours": r"000001\.png: broken prediction: mode RGB",
    "cut": r"000001\.png: broken prediction: ",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_predictions_are_refused(
    fault: str, config: Path, predictions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _break(predictions, fault)
    assert _score(config, predictions) == 2
    error = capsys.readouterr().err
    assert re.search(FAULTS[fault], error) and error.count("\n") == 1
    assert not (config.parent / "out").exists()


def test_missing_folders_two_folders_and_broken_labels_are_refused(
    config: Path, predictions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _score(config, config.parent / "nowhere") == 2
    assert "nowhere cannot be listed" in capsys.readouterr().err
    assert main(["evaluate", str(config), "--results", str(predictions), "--results", str(predictions)]) == 2
    assert "scores one folder of label maps, but 2 are named" in capsys.readouterr().err
    _write(config.parent / "data" / "annotations" / "validation", "000001.png", 200)
    assert _score(config, predictions) == 2
    assert re.search(r"annotations/validation/000001\.png: broken label map: value 200", capsys.readouterr().err)
