"""Tests reading of images with label maps, and the errors for bad files."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit3_ds.config import ConfigError, SourceConfig, load_run_config
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.tasks import build_task
from beit3_ds.tasks.segmentation.config import IGNORED
from beit3_ds.tasks.segmentation.files import LabelMaps, open_label_maps
from tests.tasks.segmentation.label_files import write_config, write_dataset


def _write(folder: Path, name: str, size: tuple[int, int] = (24, 16), values: object = 1, mode: str = "L") -> None:
    for kind in ("images", "annotations"):
        (folder / kind / "training").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(folder / "images" / "training" / f"{name}.jpg")
    labels = np.broadcast_to(np.asarray(values, dtype=np.uint8), size[::-1])
    Image.fromarray(labels).convert(mode).save(folder / "annotations" / "training" / f"{name}.png")


def _open(folder: Path, num_classes: int = 3, *, is_complete: bool = True) -> LabelMaps:
    source = SourceConfig(path=str(folder), format="ade20k", split="training")
    return open_label_maps(source, num_classes, is_complete=is_complete)


def test_zero_is_ignored_and_classes_start_at_one(tmp_path: Path) -> None:
    _write(tmp_path, "a", values=np.arange(24) % 4)
    image, labels = _open(tmp_path).read(0)
    assert image.size == (24, 16)
    assert labels[0, :5].tolist() == [IGNORED, 0, 1, 2, IGNORED]


def test_label_maps_of_class_indices(tmp_path: Path) -> None:
    _write(tmp_path, "a", values=np.array([0, 2, IGNORED] * 8))
    source = SourceConfig(
        path=str(tmp_path / "images" / "training"),
        format="label_maps",
        annotations=str(tmp_path / "annotations/training"),
    )
    _, labels = open_label_maps(source, 3, is_complete=True).read(0)
    assert labels[0, :3].tolist() == [0, 2, IGNORED]


@pytest.mark.parametrize("value", [4, 255])
def test_a_value_beyond_the_classes_names_file_and_place(value: int, tmp_path: Path) -> None:
    values = np.ones((16, 24), dtype=np.uint8)
    values[3, 5] = value
    _write(tmp_path, "a", values=values)
    with pytest.raises(BrokenRecordError, match=rf"a\.png.*value {value} at row 3, column 5 is beyond the 3 classes"):
        _open(tmp_path).read(0)


def test_label_maps_of_three_channels_are_refused(tmp_path: Path) -> None:
    _write(tmp_path, "a", mode="RGB")
    with pytest.raises(BrokenRecordError, match=r"a\.png: broken label map: mode RGB"):
        _open(tmp_path).read(0)


def test_a_label_map_of_another_size_is_found_at_the_start(tmp_path: Path) -> None:
    _write(tmp_path, "a")
    Image.new("L", (24, 17)).save(tmp_path / "annotations" / "training" / "a.png")
    with pytest.raises(ConfigError, match=r"a\.png: the label map has 24 x 17 pixels, but its image 24 x 16"):
        _open(tmp_path)


def test_missing_label_maps_are_counted(tmp_path: Path) -> None:
    for name in "abc":
        _write(tmp_path, name)
    (tmp_path / "annotations" / "training" / "b.png").unlink()
    with pytest.raises(ConfigError, match=r"1 of 3 images have no label map .*b\.jpg"):
        _open(tmp_path)
    source = _open(tmp_path, is_complete=False)
    assert [source.has_labels(index) for index in range(3)] == [True, False, True]
    assert set(np.unique(source.read(1)[1])) == {IGNORED}


@pytest.mark.parametrize("size", [(1, 1), (20000, 9), (9, 20000)])
def test_images_of_one_pixel_or_of_20000_are_named(size: tuple[int, int], tmp_path: Path) -> None:
    _write(tmp_path, "a", size=size)
    with pytest.raises(ConfigError, match=rf"a\.jpg: {size[0]} x {size[1]} pixels; images must have 8 to 16384"):
        _open(tmp_path)


def test_a_broken_file_is_one_broken_record(tmp_path: Path) -> None:
    _write(tmp_path, "a")
    (tmp_path / "annotations" / "training" / "a.png").write_bytes(b"no image")
    with pytest.raises(BrokenRecordError, match=r"a\.png: broken label map"):
        _open(tmp_path).read(0)


def test_a_pipe_is_a_broken_record_and_holds_up_no_start(tmp_path: Path) -> None:
    _write(tmp_path, "a")
    labels = tmp_path / "annotations" / "training" / "a.png"
    labels.unlink()
    os.mkfifo(labels)
    with pytest.raises(BrokenRecordError, match=r"a\.png: broken label map: not a regular file"):
        _open(tmp_path).read(0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"format": "ade20k"}, "of format ade20k needs 'split'"),
        ({"format": "label_maps"}, "of format label_maps needs 'annotations'"),
    ],
)
def test_a_source_without_its_keys_is_refused(keys: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        open_label_maps(SourceConfig(path=str(tmp_path), **keys), 3, is_complete=True)


def test_names_come_from_the_dataset_or_from_a_file(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", 1, 1)
    config = write_config(tmp_path, data=tmp_path / "data")
    assert build_task(load_run_config(config)).describe()["names"][:4] == ["sky", "grass", "sand", "red"]
    names = tmp_path / "names.txt"
    names.write_text("".join(f"thing {number}\n" for number in range(8)))
    changed = load_run_config(config, [f"task.class_names={names}"])
    with pytest.raises(ConfigError, match=r"task.num_classes=9, but .*names.txt has 8 names"):
        build_task(changed).describe()
