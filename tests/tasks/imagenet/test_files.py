"""Tests reading labelled images from folders, tars and JSON lines."""

import io
import pickle
from pathlib import Path

import pytest
from PIL import Image

from beit3_ds.config import ConfigError
from beit3_ds.sample_data.build import write_shard
from beit3_ds.tasks.imagenet.classes import ClassList, ImageClass
from beit3_ds.tasks.imagenet.files import read_class_folders, read_class_lines, read_class_tars

CLASSES = ClassList([ImageClass("n2", "crane"), ImageClass("n1", "tench")], "classes.txt")


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7)).save(file, "PNG")
    return file.getvalue()


def test_folders(tmp_path: Path) -> None:
    for name in ("n1/b.png", "n2/a.png", "n1/deep/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    images = pickle.loads(pickle.dumps(read_class_folders(str(tmp_path), CLASSES)))
    found = {images.name(index).removeprefix(f"{tmp_path}/"): images.label(index) for index in range(len(images))}
    assert found == {"n1/b.png": 1, "n1/deep/c.png": 1, "n2/a.png": 0}  # catches labels in the order of folders
    assert images.image(0).size == (9, 7) and images.skipped == {}
    (tmp_path / "n3").mkdir()
    (tmp_path / "n3" / "x.png").write_bytes(png())
    with pytest.raises(ConfigError, match=r"n3/x\.png is of the class 'n3'"):
        read_class_folders(str(tmp_path), CLASSES)
    (tmp_path / "n3" / "x.png").rename(tmp_path / "flat.png")
    with pytest.raises(ConfigError, match=r"flat\.png is in no folder of a class"):
        read_class_folders(str(tmp_path), CLASSES)


def test_tars(tmp_path: Path) -> None:
    members = [("n1/x.png", png()), ("n1_7.png", png()), ("7.png", png()), ("7.cls", b"0\n"), ("8.cls", b"1")]
    write_shard(tmp_path / "a.tar", [*members, ("8.png", png())])
    images = read_class_tars(str(tmp_path / "*.tar"), CLASSES)
    found = {images.name(index).rpartition(":")[2]: images.label(index) for index in range(len(images))}
    assert found == {"n1/x": 1, "n1_7": 1, "7": 0, "8": 1}


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("7", b"2", r"a\.tar:7\.cls is 2, but classes\.txt has classes 0 to 1"),
        ("7", b"x", r"a\.tar:7\.cls is b'x' and not a number"),
        ("n4_1", None, r"a\.tar:n4_1 is of the class 'n4'"),
    ],
)
def test_wrong_tars_are_named(tmp_path: Path, name: str, number: bytes | None, message: str) -> None:
    write_shard(tmp_path / "a.tar", [(f"{name}.png", png()), *([(f"{name}.cls", number)] if number else [])])
    with pytest.raises(ConfigError, match=message):
        read_class_tars(str(tmp_path / "a.tar"), CLASSES)


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "images.jsonl"
    (tmp_path / "a.png").write_bytes(png())
    lines = '{"image": "a.png", "class": "n1"}\n{"image": "b.png", "class": "n2"}\n'
    path.write_text(lines)
    images = read_class_lines(str(path), str(tmp_path), CLASSES)
    assert [images.label(index) for index in range(2)] == [1, 0] and images.image(0).size == (9, 7)
    for line, message in (
        ('{"image": "a.png", "class": "n2"}', r"images\.jsonl:3: the image 'a\.png' occurs twice \(first in line 1\)"),
        ('{"image": "c.png", "class": "n9"}', r"images\.jsonl:3 is of the class 'n9'"),
    ):
        path.write_text(lines + line)
        with pytest.raises(ConfigError, match=message):
            read_class_lines(str(path), str(tmp_path), CLASSES)
