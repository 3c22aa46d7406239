"""Generates hostile images, and folders with hostile images or links."""

import io
import random
from pathlib import Path
from typing import Any

from PIL import Image

from beit3_ds.data.files.patterns import expand_patterns
from beit3_ds.data.images.folder import ImageFolder
from beit3_ds.data.images.source import ImageSource
from beit3_ds.tasks.imagenet.classes import ClassList, ImageClass
from beit3_ds.tasks.imagenet.files import read_class_folders
from tests.hostile.corpus import HostileKind, read_records
from tests.hostile.values import ESCAPES, changed_json_text, damage_bytes, replace_file


def picture(image_format: str = "PNG", size: tuple[int, int] = (8, 6), mode: str = "RGB", **options: Any) -> bytes:
    """Returns the bytes of an image file."""
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, image_format, **options)
    return buffer.getvalue()


PNG = picture()


def _bomb(draw: random.Random) -> bytes:
    match draw.randrange(9):
        case 0:
            return picture("PNG", (20_000, 20_000), "1")
        case 1:
            return picture("PNG", draw.choice([(9459, 9459), (6100, 6100), (5900, 5900)]))
        case 2:
            return picture("JPEG", draw.choice([(9459, 9459), (5000, 5000), (4800, 4800)]), progressive=True)
        case 3:
            return picture("GIF", (4000, 4000), "P", save_all=True, append_images=[Image.new("P", (4000, 4000))] * 3)
        case 4:
            return picture("TIFF", (5000, 5000), "RGB", compression="tiff_lzw")
        case 5:
            return picture("WEBP", (3900, 3900))
        case 6:
            return picture("BMP", (3000, 3000))
        case 7:
            return picture("PNG", (3000, 3000), draw.choice(["RGBA", "LA", "P", "I;16", "L"]))
        case _:
            return picture("TIFF", (2000, 2000), draw.choice(["F", "I", "CMYK", "RGBA", "1", "LAB"]))


def damaged_image(draw: random.Random) -> bytes:
    if draw.random() < 0.2:
        return _bomb(draw)
    data = picture(draw.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]), (40, 30))
    return damage_bytes(data, draw) if draw.random() < 0.8 else draw.choice([b"", b"\0" * 1000, data[:20], b"GIF89a"])


def _write_folder(folder: Path, draw: random.Random) -> Path:
    path = folder / "images"
    for name in ("a/1.png", "a/2.jpg", "b/3.png"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(PNG)
    for name in ("a/1.txt", "a/2.json", "b/3.txt"):
        (path / name).write_text('{"caption": "a dog"}')
    changed = path / draw.choice(["a/1.png", "a/2.jpg", "a/1.txt", "a/2.json"])
    match draw.randrange(6):
        case 0:
            replace_file(changed, draw)
        case 1:
            (path / "a/loop").symlink_to("../..")
            (path / "b/loop").symlink_to("..")
        case 2:
            (path / "a/out.png").symlink_to("/etc/passwd")
            (path / f"a/{ESCAPES}.png").write_bytes(b"no image")
        case 3 if changed.suffix == ".json":
            changed.write_bytes(changed_json_text({"caption": "a dog", "exif": {"a": [1]}}, draw))
        case 4 if changed.suffix in (".json", ".txt"):
            changed.write_bytes(draw.choice([b"\0", b"\xff", b"x" * 70_000, b" " * 5000, b"\xef\xbb\xbf", b"\x1b[2J"]))
        case _:
            (path / "a/1.png").write_bytes(damaged_image(draw))
    return path


def read_source(source: ImageSource) -> None:
    list(source.files())
    read_records(len(source), source.name, source.image, source.caption, source.pair)


def _write_links(folder: Path, draw: random.Random) -> Path:
    """Writes folders whose links lead to parent folders, so following them would never end."""
    folders = [folder / "top", *(folder / f"top/{'/'.join('abcde'[: n + 1])}" for n in range(5))]
    folders[-1].mkdir(parents=True)
    pattern = draw.choice(["*.txt", "**", "*/*.txt", "link*/**/*.txt"])
    targets = ["..", ".", "../..", str(folder), "/nowhere", str(folders[2])]
    for number in range(draw.randrange(2, 30)):
        place = draw.choice(folders) / f"link{number}"
        place.symlink_to(draw.choice([*targets, place.name, *([] if "link" in pattern else ["/"])]))
    for place in folders:
        (place / "t.txt").write_text("a dog\n")
    return folder / "top" / "**" / pattern


FOLDERS = {
    "folder of images": HostileKind(_write_folder, lambda p: read_source(ImageFolder(str(p)))),
    "folder of classes": HostileKind(
        _write_folder, lambda p: read_class_folders(str(p), ClassList([ImageClass("a", "a"), ImageClass("b", "b")]))
    ),
    "pattern through links": HostileKind(_write_links, lambda p: expand_patterns([str(p)])),
}
