"""Images found by the names that annotations give, as files and in tars."""

import io
import pickle
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from beit3_ds.config import ConfigError
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.images.by_name import ImagesByName, open_images_by_name


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, color in (("a/one.png", "red"), ("b/one.png", "blue"), ("two.png", "lime")):
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(png(color))
    (tmp_path / "secret.png").write_bytes(png("white"))
    return tmp_path / "files"


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    (tmp_path / "tars").mkdir()
    for tar, names in (("0", ("a/one.png", "two.png")), ("1", ("b/one.png", "c/three.png"))):
        with tarfile.open(tmp_path / "tars" / f"{tar}.tar", "w") as archive:
            for name in names:
                info = tarfile.TarInfo(name)
                data = png({"a/one.png": "red", "b/one.png": "blue"}.get(name, "lime"))
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return tmp_path / "tars"


def color(images: ImagesByName, name: str) -> tuple[int, ...]:
    found = images.image(name).getpixel((0, 0))
    assert isinstance(found, tuple)
    return found


def test_files_are_found_by_path(folder: Path) -> None:
    images = pickle.loads(pickle.dumps(ImagesByName(str(folder))))
    assert images.missing(["two.png", "a/one.png", "a/two.png", "c/x.png", "../secret.png", "one.png"]) == [
        *("a/two.png", "c/x.png", "../secret.png", "one.png")
    ]
    assert (color(images, "a/one.png"), color(images, "b/one.png")) == ((255, 0, 0), (0, 0, 255))
    for name in ("../secret.png", "a/two.png"):
        with pytest.raises(BrokenRecordError):
            images.image(name)


def test_members_of_tars_are_found_by_key_or_last_part(tars: Path) -> None:
    images = pickle.loads(pickle.dumps(ImagesByName(str(tars))))
    assert (color(images, "a/one.jpg"), color(images, "b/one.png")) == ((255, 0, 0), (0, 0, 255))
    assert color(images, "three.png") == (0, 255, 0)
    assert images.missing(["one.png", "three.png", "four.png"]) == ["one.png", "four.png"]  # one.png could be either


def test_missing_images_are_named_with_their_place(folder: Path) -> None:
    names = [("two.png", "q.jsonl:1"), ("no.png", "q.jsonl:2"), ("no.png", "q.jsonl:7")]
    with pytest.raises(ConfigError, match=r"lacks 1 of 2 images, such as no\.png, which q\.jsonl:2 names"):
        open_images_by_name(str(folder), names)
    assert color(open_images_by_name(str(folder), names[:1]), "two.png") == (0, 255, 0)
