"""Generates hostile data files: annotations, captions, texts, tars, images, and caches of them."""

import gzip
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from PIL import Image

from beit3_ds.data.files.patterns import expand_patterns
from beit3_ds.data.images.annotated import AnnotatedImages
from beit3_ds.data.images.annotation_table import StoredAnnotations, describe_files, write_table
from beit3_ds.data.images.annotations import (
    read_coco_captions,
    read_conceptual_captions,
    read_sbu_captions,
    read_visual_genome,
)
from beit3_ds.data.images.caption_files import read_captions
from beit3_ds.data.images.captioned import CaptionedImages
from beit3_ds.data.images.folder import ImageFolder
from beit3_ds.data.images.shard_index import StoredIndex, index_path, write_index
from beit3_ds.data.images.shard_scan import scan_shard
from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.images.source import ImageSource
from beit3_ds.data.sources import check_images_are_there, check_no_image_is_missing
from beit3_ds.data.text.paragraphs import BrokenLines, cut_into_pieces, read_paragraphs
from beit3_ds.inference.requests import read_names, read_questions
from beit3_ds.tasks.imagenet.classes import ClassList, ImageClass
from beit3_ds.tasks.imagenet.files import read_class_folders, read_class_lines, read_class_tars
from beit3_ds.tasks.nlvr2.files import Statements, read_nlvr2, read_statement_lines
from beit3_ds.tasks.vqa.answers import AnswerVocabulary
from beit3_ds.tasks.vqa.files import VqaQuestions, read_visual_genome_questions, read_vqa_lines, read_vqav2
from tests.hostile.corpus import HostileKind, read_records
from tests.hostile.values import ESCAPES, changed_json_text, damage_bytes, replace_file

Write = Callable[[Path, random.Random], Path]
BUDGET = 5  # broken lines that a reader of texts accepts


def picture(image_format: str = "PNG", size: tuple[int, int] = (8, 6), mode: str = "RGB", **options: Any) -> bytes:
    """Returns the bytes of an image file."""
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, image_format, **options)
    return buffer.getvalue()


PNG = picture()
NAMES = ("1.png", "2.png", "COCO_val2014_000000000001.png", "COCO_val2014_000000000001.jpg")


def _images(folder: Path) -> Path:
    inside = folder / "images"
    for name in (
        *NAMES,
        "val2014/1.png",
        f"val2014/{NAMES[3]}",
        "VG_100K/1.jpg",
        "VG_100K/2.jpg",
        "dev-1-0-img0.png",
        "dev-1-0-img1.png",
    ):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_bytes(PNG)
    return folder


# JSON files: the whole content of each kind.

COCO = {
    "info": {"year": 2014},
    "images": [{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": "2.png"}],
    "annotations": [{"id": 7, "image_id": 1, "caption": "a dog"}, {"id": 8, "image_id": 2, "caption": "a cat"}],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filepath": "val2014", "filename": "1.png", "split": split, "cocoid": number, "sentences": [{"raw": "a dog"}]}
        for number, split in enumerate(("test", "train", "restval", "val"))
    ],
}
GENOME_IMAGES = [{"image_id": 1, "url": "https://x/VG_100K/1.jpg"}, {"image_id": 2, "url": "https://x/VG_100K/2.jpg"}]
GENOME_REGIONS = [{"id": 1, "regions": [{"phrase": "a dog"}, {"phrase": "a cat"}]}]
GENOME_QUESTIONS = [{"id": 1, "qas": [{"qa_id": 5, "question": "what is it?", "answer": "a dog"}]}]
SBU = {"captions": ["a dog", "a cat", "a bird"], "image_urls": ["u", "v", "w"]}
VQA_QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [{"question_id": 10, "image_id": 1, "question": "what is it?"}],
}
VQA_ANSWERS = {
    "annotations": [
        {
            "question_id": 10,
            "multiple_choice_answer": "dog",
            "question_type": "what",
            "answer_type": "other",
            "answers": [{"answer": "dog"}, {"answer": "cat"}],
        }
    ]
}
CAPTION_LINES = [{"image": "1.png", "captions": ["a dog"], "id": 1}, {"image": "2.png", "caption": "a cat", "id": 2}]
VQA_LINES = [
    {"image": "1.png", "question": "what?", "answers": ["dog"], "id": 1, "question_type": "what"},
    {"image": "2.png", "question": "who?", "answer": "cat", "id": 2},
]
NLVR2_LINES = [{"identifier": "dev-1-0-0", "sentence": "two dogs", "label": "True", "directory": "."}]
STATEMENT_LINES = [{"left": "1.png", "right": "2.png", "sentence": "two dogs", "label": True, "id": 1, "group": "g"}]
CLASS_LINES = [{"image": "1.png", "class": "dog"}, {"image": "2.png", "class": "cat"}]
ANSWER_LINES = [{"answer": "dog", "label": 0}, {"answer": "cat", "label": 1}]
QUESTION_LINES = [{"image": "images/1.png", "question": "what?", "id": 1}]
TEXT_LINES = [{"text": "one dog\ntwo dogs", "meta": {"n": 1}}, {"text": "three dogs"}]
CLASSES = ClassList([ImageClass("dog", "a dog"), ImageClass("cat", "a cat")])


def _json_writer(name: str, content: Any, *others: tuple[str, Any]) -> Write:
    """Returns a function that writes JSON files, one of which is hostile: `name` or one of `others`."""

    def write(folder: Path, draw: random.Random) -> Path:
        contents = {name: content, **dict(others)}
        for file, value in contents.items():
            (folder / file).write_text(json.dumps(value))
        changed = folder / draw.choice(list(contents))
        if draw.random() < 0.25:
            replace_file(changed, draw)
        else:
            changed.write_bytes(changed_json_text(contents[changed.name], draw))
        return _images(folder) / name

    return write


def _lines_writer(name: str, lines: list[Any]) -> Write:
    def write(folder: Path, draw: random.Random) -> Path:
        texts = [json.dumps(line).encode() for line in lines]
        texts[draw.randrange(len(texts))] = changed_json_text(draw.choice(lines), draw)
        path = folder / name
        path.write_bytes(draw.choice([b"\n", b"\r\n", b"\n\n \n", b"\0\n"]).join(texts))
        if draw.random() < 0.25:
            replace_file(path, draw)
        return _images(folder) / name

    return write


def _read_images(samples: AnnotatedImages) -> None:
    check_images_are_there(samples, 16)
    check_no_image_is_missing(samples)
    list(samples.files())
    read_records(len(samples), samples.name, samples.image, samples.caption, samples.pair)


def _read_captions(samples: CaptionedImages) -> None:
    _read_images(samples)
    images = samples.each_image()
    read_records(len(images), images.name, images.identifier, images.references)


def _read_questions(samples: VqaQuestions) -> None:
    _read_images(samples)
    read_records(len(samples), samples.identifier, samples.types, samples.answers)
    AnswerVocabulary.build(samples.main_answers(), 1)


def _read_statements(samples: Statements) -> None:
    samples.check_has_labels()
    samples.check_no_image_is_missing()
    for side in (0, 1):
        read_records(len(samples), samples.name, lambda index, side=side: samples.image(index, side))  # type: ignore[misc]


def _beside(path: Path) -> str:
    return str(path.parent / "images")


ANNOTATIONS = {
    "coco": HostileKind(
        _json_writer("captions.json", COCO), lambda p: _read_images(read_coco_captions(str(p), _beside(p)))
    ),
    "visual genome": HostileKind(
        _json_writer("region_descriptions.json", GENOME_REGIONS, ("image_data.json", GENOME_IMAGES)),
        lambda p: _read_images(read_visual_genome(str(p), str(p.parent / "image_data.json"), _beside(p))),
    ),
    "sbu json": HostileKind(
        _json_writer("captions.json", SBU), lambda p: _read_images(read_sbu_captions(str(p), _beside(p)))
    ),
    "karpathy": HostileKind(
        _json_writer("dataset_coco.json", KARPATHY),
        lambda p: _read_captions(read_captions(str(p), _beside(p), "karpathy", "train")),
    ),
    "coco images": HostileKind(
        _json_writer("captions.json", COCO),
        lambda p: _read_captions(read_captions(str(p), _beside(p), "coco_images")),
    ),
    "caption lines": HostileKind(
        _lines_writer("captions.jsonl", CAPTION_LINES),
        lambda p: _read_captions(read_captions(str(p), _beside(p), "caption_lines")),
    ),
    "vqav2": HostileKind(
        _json_writer("questions.json", VQA_QUESTIONS, ("answers.json", VQA_ANSWERS)),
        lambda p: _read_questions(read_vqav2(str(p), str(p.parent / "answers.json"), _beside(p))),
    ),
    "vqa of visual genome": HostileKind(
        _json_writer("question_answers.json", GENOME_QUESTIONS, ("image_data.json", GENOME_IMAGES)),
        lambda p: _read_questions(read_visual_genome_questions(str(p), str(p.parent / "image_data.json"), _beside(p))),
    ),
    "vqa lines": HostileKind(
        _lines_writer("questions.jsonl", VQA_LINES), lambda p: _read_questions(read_vqa_lines(str(p), _beside(p)))
    ),
    "answers": HostileKind(_lines_writer("answers.jsonl", ANSWER_LINES), AnswerVocabulary.load),
    "nlvr2": HostileKind(
        _lines_writer("dev.json", NLVR2_LINES), lambda p: _read_statements(read_nlvr2(str(p), _beside(p)))
    ),
    "statement lines": HostileKind(
        _lines_writer("dev.jsonl", STATEMENT_LINES),
        lambda p: _read_statements(read_statement_lines(str(p), _beside(p))),
    ),
    "class lines": HostileKind(
        _lines_writer("train.jsonl", CLASS_LINES),
        lambda p: read_class_lines(str(p), _beside(p), CLASSES),
    ),
    "questions of a command": HostileKind(_lines_writer("questions.jsonl", QUESTION_LINES), read_questions),
}


# Texts.


def _write_table_of_captions(folder: Path, draw: random.Random) -> Path:
    data = b"a dog\thttp://x\na cat\thttp://y\nno columns\n"
    return _write_bytes(_images(folder) / "captions.tsv", data, draw)


def _write_caption_column(folder: Path, draw: random.Random) -> Path:
    return _write_bytes(_images(folder) / "captions.txt", b"a dog\na cat\na bird\n", draw)


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
    if draw.random() < 0.25:
        replace_file(path, draw)
    elif draw.random() < 0.05:
        os.truncate(path, 1 << 40)
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
        lambda p: _read_images(read_conceptual_captions(str(p), _beside(p), "caption_url")),
    ),
    "column of captions": HostileKind(
        _write_caption_column, lambda p: _read_images(read_sbu_captions(str(p), _beside(p)))
    ),
    "class names": HostileKind(_write_class_names, lambda p: ClassList.load(str(p))),
    "names of a command": HostileKind(_write_class_names, read_names),
}


# Images and folders.


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


def _image(draw: random.Random) -> bytes:
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
            (path / "a/1.png").write_bytes(_image(draw))
    return path


def _read_source(source: ImageSource) -> None:
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
    "folder of images": HostileKind(_write_folder, lambda p: _read_source(ImageFolder(str(p)))),
    "folder of classes": HostileKind(
        _write_folder, lambda p: read_class_folders(str(p), ClassList([ImageClass("a", "a"), ImageClass("b", "b")]))
    ),
    "pattern through links": HostileKind(_write_links, lambda p: expand_patterns([str(p)])),
}


# Tars.


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
                data = _image(draw)
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
    if draw.random() < 0.15:
        replace_file(path, draw)
    elif draw.random() < 0.05:
        os.truncate(path, 1 << 40)
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
    _read_source(TarShards([str(tar)], cache))
    StoredIndex(index_path(cache, str(tar)), str(tar)).load()


def _write_annotation_table(folder: Path, draw: random.Random) -> Path:
    path = _images(folder) / "captions.json"
    path.write_text(json.dumps(COCO))
    table = folder / "cache.table"
    write_table(read_coco_captions(str(path), _beside(path)), str(table), describe_files([str(path)]))
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
    _read_images(StoredAnnotations(str(table), [str(file)], _beside(file)))


CACHES = {
    "tar": HostileKind(_write_tar, lambda p: _read_source(TarShards([str(p)]))),
    "tar of classes": HostileKind(_write_tar, lambda p: read_class_tars(str(p), CLASSES)),
    "index of a tar": HostileKind(_write_index, _read_index),
    "table of annotations": HostileKind(_write_annotation_table, _read_annotation_table),
}

KINDS = {**ANNOTATIONS, **TEXTS, **FOLDERS, **CACHES}
