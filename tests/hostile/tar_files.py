"""Generates hostile tars, and hostile caches of tars and annotation files."""

import gzip
import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import zstandard

from beit3_ds.data.images.annotation_table import StoredAnnotations, describe_files, write_table
from beit3_ds.data.images.annotations import (
    read_coco_captions,
)
from beit3_ds.data.images.shard_index import StoredIndex, index_path, write_index
from beit3_ds.data.images.shard_scan import scan_shard
from beit3_ds.data.images.shards import TarShards
from beit3_ds.tasks.imagenet.files import read_class_tars
from tests.hostile.annotation_files import CLASSES, COCO, images_beside, read_images, write_images
from tests.hostile.corpus import HostileKind
from tests.hostile.image_files import PNG, damaged_image, read_source
from tests.hostile.values import ESCAPES, changed_json_text, damage_bytes, replace_file, spoil_file


def tar_bytes(draw: random.Random) -> bytes:
    """Returns a tar with members that are links or devices, lie outside the folder, or have wrong sizes."""
    buffer = io.BytesIO()
    tar_format = draw.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
    names = [
        "dog_1.png",
        "dog_1.txt",
        "cat_2.png",
        "dog_1.json",
        "cat_2.cls",
        "/etc/passwd.png",
        "../up.png",
        "a/../../b.txt",
        "x" * 90,
    ]
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format, errors="surrogateescape") as archive:
        for number in range(draw.randrange(1, 8)):
            info = tarfile.TarInfo(draw.choice(names))
            if tar_format != tarfile.USTAR_FORMAT and draw.random() < 0.2:
                info.name = draw.choice([f"{ESCAPES}.png", "n" * 5000 + ".png", "a\nb.txt", f"{number}.png/"])
            data = draw.choice([PNG, b"a dog", b'{"caption": "a dog"}', b"", b"7", b"9" * 5000, b"\xff" * 9])
            if draw.random() < 0.2:
                data = damaged_image(draw)
            info.type = draw.choice(
                [tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, b"6", b"S", b"Z"]
            )
            info.linkname, info.size = "/etc/passwd", len(data)
            if tar_format == tarfile.PAX_FORMAT and draw.random() < 0.2:
                info.pax_headers = draw.choice(
                    [
                        {"size": str(1 << 62)},
                        {"size": "-5"},
                        {"GNU.sparse.major": "1"},
                        {"path": ESCAPES},
                        {"a": "b" * 9999},
                    ]
                )
            archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return buffer.getvalue()


def _write_tar(folder: Path, draw: random.Random) -> Path:
    path, data = folder / "s.tar", tar_bytes(draw)
    match draw.randrange(6):
        case 0:
            data = damage_bytes(data, draw)
        case 1:
            data = draw.choice([gzip.compress, zstandard.compress])(draw.choice([data, gzip.compress(data)]))
        case 2:
            position = 512 * draw.randrange(max(1, len(data) // 512 - 20))
            header = bytearray(data[position : position + 512])
            header[124:136] = draw.choice([b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000001\0"])
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            data = data[:position] + bytes(header) + data[position + 512 :]
        case _:
            pass
    path.write_bytes(data)
    spoil_file(path, draw, chance=0.15)
    return path


def _write_index(folder: Path, draw: random.Random) -> Path:
    tar = folder / "s.tar"
    _write_plain_tar(tar)
    path = Path(index_path(str(folder / "cache"), str(tar)))
    write_index(scan_shard(str(tar), with_checksums=True), str(path))
    _change_first_line(path, draw)
    return tar


def _write_plain_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in (("1.png", PNG), ("1.txt", b"a dog"), ("2.png", PNG)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _change_first_line(path: Path, draw: random.Random) -> None:
    """Changes a cache: the JSON in its first line, the bytes after it, or the whole file."""
    line, _, rest = path.read_bytes().partition(b"\n")
    match draw.randrange(4):
        case 0:
            replace_file(path, draw)
        case 1:
            path.write_bytes(line + b"\n" + (damage_bytes(rest, draw) if rest else b""))
        case 2:
            content = json.loads(line)
            sizes = [key for key, value in content.items() if isinstance(value, int | list)]
            content[draw.choice(sizes)] = draw.choice([2**62, -1, 2**31, "5", 1.5, None, [1] * 4, [-1, 2**60, 0, 0]])
            path.write_bytes(json.dumps(content).encode() + b"\n" + rest)
        case _:
            path.write_bytes(changed_json_text(json.loads(line), draw) + b"\n" + rest)


def _read_index(tar: Path) -> None:
    cache = str(tar.parent / "cache")
    read_source(TarShards([str(tar)], cache))
    StoredIndex(index_path(cache, str(tar)), str(tar)).load()


def _write_annotation_table(folder: Path, draw: random.Random) -> Path:
    path = write_images(folder) / "captions.json"
    path.write_text(json.dumps(COCO))
    table = folder / "cache.table"
    write_table(read_coco_captions(str(path), images_beside(path)), str(table), describe_files([str(path)]))
    _change_first_line(table, draw)
    if draw.random() < 0.3 and table.is_file() and table.stat().st_size < 1 << 20:
        line, _, rest = table.read_bytes().partition(b"\n")
        numbers = np.frombuffer(rest[: len(rest) // 8 * 8], dtype="<i8").copy()
        if len(numbers):
            numbers[draw.randrange(len(numbers))] = draw.choice([-1, -5, 2**62, 10, -(2**62)])
            table.write_bytes(line + b"\n" + numbers.tobytes() + rest[len(numbers) * 8 :])
    return table


def _read_annotation_table(table: Path) -> None:
    file = table.parent / "captions.json"
    read_images(StoredAnnotations(str(table), [str(file)], images_beside(file)))


TARS = {
    "tar": HostileKind(_write_tar, lambda p: read_source(TarShards([str(p)]))),
    "tar of classes": HostileKind(_write_tar, lambda p: read_class_tars(str(p), CLASSES)),
    "index of a tar": HostileKind(_write_index, _read_index),
    "table of annotations": HostileKind(_write_annotation_table, _read_annotation_table),
}
