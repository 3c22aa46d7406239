"""Tests that images are found by the names in annotations, as files and in tars."""

import io
import pickle
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from beit3_ds.config import ConfigError
from beit3_ds.data.images.annotated import CollectedAnnotations
from beit3_ds.data.images.by_name import ImagesByName
from beit3_ds.data.sources import check_no_image_is_missing


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
        assert not images.holds(name)
        with pytest.raises(ValueError, match=r"out of the folder|No such file"):
            images.image(name)


def test_members_of_tars_are_found_by_key_or_last_part(tars: Path) -> None:
    images = pickle.loads(pickle.dumps(ImagesByName(str(tars / "*.tar"))))
    assert (color(images, "a/one.jpg"), color(images, "b/one.png")) == ((255, 0, 0), (0, 0, 255))
    assert color(images, "three.png") == (0, 255, 0)
    assert images.missing(["one.png", "three.png", "four.png"]) == ["one.png", "four.png"]  # one.png could be either


def test_missing_images_are_named_with_their_sample(folder: Path) -> None:
    samples = CollectedAnnotations("q.jsonl", str(folder))
    for name in ("two.png", "unused.png", "no.png"):
        samples.add_image(name)
    samples.add_sample(0, "first")
    check_no_image_is_missing(samples)  # nobody asks for the image that is not there
    samples.add_sample(2, "second")
    with pytest.raises(ConfigError, match=r"lacks 2 of 3 images. The first is that of q\.jsonl:1 \(no\.png\)"):
        check_no_image_is_missing(samples)
