"""Generates hostile texts: text files, columns of captions and lists of names."""

import gzip
import json
import random
from pathlib import Path

import zstandard

from beit3_ds.data.files.patterns import expand_patterns
from beit3_ds.data.images.annotations import (
    read_conceptual_captions,
    read_sbu_captions,
)
from beit3_ds.data.text.paragraphs import BrokenLines, cut_into_pieces, read_paragraphs
from beit3_ds.inference.requests import read_names
from beit3_ds.tasks.imagenet.classes import ClassList
from tests.hostile.annotation_files import images_beside, read_images, write_images
from tests.hostile.corpus import HostileKind
from tests.hostile.values import ESCAPES, changed_json_text, damage_bytes, replace_file, spoil_file

BUDGET = 5  # broken lines that a reader of texts accepts
TEXT_LINES = [{"text": "one dog\ntwo dogs", "meta": {"n": 1}}, {"text": "three dogs"}]


def _write_table_of_captions(folder: Path, draw: random.Random) -> Path:
    data = b"a dog\thttp://x\na cat\thttp://y\nno columns\n"
    return _write_bytes(write_images(folder) / "captions.tsv", data, draw)


def _write_caption_column(folder: Path, draw: random.Random) -> Path:
    return _write_bytes(write_images(folder) / "captions.txt", b"a dog\na cat\na bird\n", draw)


def _write_class_names(folder: Path, draw: random.Random) -> Path:
    return _write_bytes(folder / "names.txt", b"n01 a dog\nn02 a cat\n", draw)


def _write_bytes(path: Path, data: bytes, draw: random.Random) -> Path:
    path.write_bytes(damage_bytes(data, draw))
    if draw.random() < 0.4:
        path.write_bytes(data)
        replace_file(path, draw)
    return path


def _write_text(folder: Path, draw: random.Random) -> Path:
    name = draw.choice(["t.txt", "t.jsonl", "t.json", "t.ndjson", "t.md"])
    lines = [json.dumps(line).encode() for line in TEXT_LINES]
    if name in ("t.txt", "t.md"):
        lines = [b"one dog", b"", b"two dogs. Three dogs."]
    match draw.randrange(8):
        case 0:
            lines = [b""] * 3_000_000
        case 1:
            lines.append(b"x" * draw.choice([5000, 17 << 20, 60 << 20]))
        case 2:
            lines.insert(
                0, draw.choice([b"nul\0byte", b"caf\xe9", b"\x1b[2J", ESCAPES.encode("utf-8", "replace"), b"\xff\xfe"])
            )
        case 3 if name != "t.txt":
            lines[0] = changed_json_text(TEXT_LINES[0], draw)
        case 4 if name in ("t.json", "t.jsonl"):
            lines = [b"[" + b",\n".join(lines), draw.choice([b"]", b",", b"", b"[" * 100_000])]
        case 5:
            lines = [draw.choice([b" ", b"\r", b"\t"]) * 3_000_000]
        case _:
            pass
    data = b"\n".join(lines)
    compression = draw.choice(["", "", ".gz", ".zst"])
    if compression:
        data = gzip.compress(data, 1) if compression == ".gz" else zstandard.compress(data, 1)
        data = draw.choice([data, data, data * 2, gzip.compress(data), damage_bytes(data, draw)])
    path = folder / f"{name}{compression}"
    path.write_bytes(data)
    spoil_file(path, draw, chance=0.25)
    return path


def _read_text(path: Path) -> None:
    (file,) = expand_patterns([str(path)])
    broken = BrokenLines(BUDGET)
    for piece in cut_into_pieces(file, 64 << 20):
        for _ in read_paragraphs(piece, broken):
            pass


TEXTS = {
    "text": HostileKind(_write_text, _read_text),
    "table of captions": HostileKind(
        _write_table_of_captions,
        lambda p: read_images(read_conceptual_captions(str(p), images_beside(p), "caption_url")),
    ),
    "column of captions": HostileKind(
        _write_caption_column, lambda p: read_images(read_sbu_captions(str(p), images_beside(p)))
    ),
    "class names": HostileKind(_write_class_names, lambda p: ClassList.load(str(p))),
    "names of a command": HostileKind(_write_class_names, read_names),
}
