"""Tests reading of NLVR2's published files, and of statements in JSON lines.

The fixtures follow the published descriptions of the formats. The official files were never read.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from beit3_ds.config import ConfigError
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.tasks.nlvr2.files import Statements, read_nlvr2, read_statement_lines

FACTS = {"left_url": "https://example.org/a.jpg", "right_url": "https://example.org/b.jpg", "synset": "acorn"}


def entry(identifier: str, label: str | None = "True", **further: Any) -> dict[str, Any]:
    label_entry = {} if label is None else {"label": label}
    return {"identifier": identifier, "sentence": "An acorn is on a leaf.", **label_entry, **FACTS, **further}


def write(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "dev.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in entries))
    return path


def paths(samples: Statements) -> list[str]:
    return [samples.image_path(index, side) for index in range(len(samples)) for side in (0, 1)]


def test_flat_folders_of_dev_and_test(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    Image.new("RGB", (9, 7)).save(tmp_path / "dev" / "dev-850-0-img0.png")
    path = write(tmp_path, entry("dev-850-0-0"), entry("dev-850-1-0", "False"), entry("dev-850-1-1", "True"))
    samples = pickle.loads(pickle.dumps(read_nlvr2(str(path), str(tmp_path))))
    assert paths(samples)[:4] == [f"dev/dev-850-{pair}-img{side}.png" for pair in (0, 1) for side in (0, 1)]
    assert paths(read_nlvr2(str(path), str(tmp_path / "dev")))[:1] == ["dev-850-0-img0.png"]
    # the same sentence about two pairs is one group; another sentence of the set is another
    assert samples.group(0) == samples.group(1) != samples.group(2)
    assert [samples.label(index) for index in range(3)] == [True, False, True]
    assert samples.image(0, 0).mode == "RGB"
    with pytest.raises(ConfigError, match=r"lacks 3 of 4 images\. The first is dev/dev-850-0-img1\.png .*:1 "):
        samples.check_no_image_is_missing()
    with pytest.raises(
        BrokenRecordError, match=r"dev\.json:1 \(dev-850-0-0\) \(dev/dev-850-0-img1\.png\): broken image"
    ):
        samples.image(0, 1)


def test_training_images_are_in_directories(tmp_path: Path) -> None:
    (tmp_path / "images" / "train").mkdir(parents=True)
    samples = read_nlvr2(str(write(tmp_path, entry("train-10171-0-0", directory=55))), str(tmp_path))
    assert paths(samples)[0] == "images/train/55/train-10171-0-img0.png"
    (tmp_path / "other").mkdir()
    samples = read_nlvr2(str(tmp_path / "dev.json"), str(tmp_path / "other"))
    assert paths(samples)[1] == "55/train-10171-0-img1.png"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("dev-1-0-0"), entry("dev-1-0-0")], r"dev\.json:2: the id 'dev-1-0-0' occurs twice \(first in line 1\)"),
        ([entry("dev-1")], r"dev\.json:1: identifier 'dev-1' is not of the form"),
        ([entry("dev-1-0-0", "maybe")], r"dev\.json:1: label 'maybe' is neither true nor false"),
        ([entry("dev-1-0-0", sentence="")], r"dev\.json:1: broken sentence: empty"),
        ([{"identifier": "dev-1-0-0"}], r"dev\.json:1 has no 'sentence'"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, entries: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_nlvr2(str(write(tmp_path, *entries)), str(tmp_path))


def test_a_split_without_labels_is_not_scored(tmp_path: Path) -> None:
    samples = read_nlvr2(str(write(tmp_path, entry("test1-1-0-0", None))), str(tmp_path))
    assert samples.label(0) is None and not samples.has_labels
    with pytest.raises(ConfigError, match=r"dev\.json:1 \(test1-1-0-0\) has no label.*scored"):
        samples.check_has_labels()


def test_json_lines(tmp_path: Path) -> None:
    line = {"left": "a.png", "right": "b/c.png", "sentence": "Both are red.", "label": False}
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps(line | more) for more in ({}, {"id": "x", "label": "true"}, {"group": 7})))
    samples = read_statement_lines(str(path), str(tmp_path))
    assert [samples.identifier(index) for index in range(3)] == [0, "x", 2]
    assert samples.group(0) == samples.group(1) and samples.group(2) == "7"
    assert [samples.label(index) for index in range(3)] == [False, True, False]
    assert samples.image_path(0, 1) == "b/c.png" and [file.num_samples for file in samples.files()] == [3]
