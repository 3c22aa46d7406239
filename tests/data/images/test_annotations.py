"""Tests readers of annotation files of public corpora.

The fixtures follow the published descriptions of the formats. The official files were never read.
"""

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from beit3_ds.config import ConfigError
from beit3_ds.data.files import json_lists
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.images.annotated import AnnotatedImages
from beit3_ds.data.images.annotations import (
    read_coco_captions,
    read_conceptual_captions,
    read_sbu_captions,
    read_visual_genome,
)


def _json(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def _images(folder: Path, png: bytes, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png)
    return str(folder)


def _captions(source: AnnotatedImages) -> list[str]:
    return [source.caption(i) for i in range(len(source))]


def _image_names(source: AnnotatedImages) -> list[str]:
    return [source.name(i).rpartition("(")[2].rstrip(")") for i in range(len(source))]


COCO = {
    "info": {"description": "COCO 2014 Dataset", "year": 2014},
    "licenses": [{"id": 1, "name": "Attribution", "url": "http://example.org"}],
    "images": [
        {"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "height": 480, "width": 640, "license": 1},
        {"id": 25, "file_name": "COCO_train2014_000000000025.jpg", "height": 426, "width": 640, "license": 1},
    ],
    "annotations": [
        {"image_id": 25, "id": 1, "caption": "A giraffe eating food. "},
        {"image_id": 9, "id": 2, "caption": "Closeup of bins of food.\n"},
        {"image_id": 25, "id": 3, "caption": "A giraffe by a tree."},
    ],
}


def test_coco(tmp_path: Path, png: bytes) -> None:
    folder = _images(tmp_path / "train2014", png, *(str(image["file_name"]) for image in COCO["images"]))
    source = pickle.loads(pickle.dumps(read_coco_captions(_json(tmp_path / "captions.json", COCO), folder)))
    assert _captions(source) == ["A giraffe eating food.", "Closeup of bins of food.", "A giraffe by a tree."]
    # catches the order of images, and ids taken for places
    assert [name[-6:-4] for name in _image_names(source)] == ["25", "09", "25"]
    assert source.image(0).mode == "RGB"


def test_damaged_annotations_are_broken_records(tmp_path: Path, png: bytes) -> None:
    images = [
        {"id": 1, "file_name": "1.jpg"},
        {"id": 2, "file_name": "../2.jpg"},
        {"id": 3, "file_name": "/etc/passwd"},
    ]
    images += [
        {"id": 4, "file_name": "missing.jpg"},
        {"id": 5, "file_name": "a\0.jpg"},
        {"id": 1, "file_name": "x.jpg"},
    ]
    captions = ["fine", "above", "absolute", "missing", "NUL", "no such id"]
    rows = [{"image_id": i, "caption": caption} for i, caption in enumerate(captions, start=1)]
    rows += [{"image_id": 1, "caption": caption} for caption in ("", None, ["a"], "a\0b", "\ud800")] + [{"image_id": 1}]
    _images(tmp_path, png, "in/1.jpg", "2.jpg")
    source = read_coco_captions(
        _json(tmp_path / "c.json", {"images": images, "annotations": rows}), str(tmp_path / "in")
    )
    assert len(source) == len(rows)
    assert source.image(0).mode == "RGB"
    reasons = ["leads out", "leads out", "No such file", "null", "the file does not list"]
    for index, reason in enumerate(reasons, start=1):
        with pytest.raises(BrokenRecordError, match=rf"c\.json:{index} .*{reason}"):
            source.image(index)
    for index in range(6, len(rows)):
        with pytest.raises(BrokenRecordError, match=rf"c\.json:{index} .*broken caption"):
            source.caption(index)
    assert source.skipped == {"image id twice": (1, "1")}


def _visual_genome(tmp_path: Path, num_images: int) -> tuple[str, str]:
    images = [
        {
            "image_id": i,
            "url": f"https://cs.stanford.edu/people/rak248/VG_100K{'_2' * (i % 2)}/{i}.jpg",
            "width": 800,
            "height": 600,
            "coco_id": None,
            "flickr_id": None,
        }
        for i in range(1, num_images + 1)
    ]
    region = {"width": 82, "height": 139, "x": 421, "y": 57}
    regions = [
        {
            "id": i,
            "regions": [
                {"region_id": 1382 + j, "image_id": i, "phrase": f"phrase {j}, ]}} {i}"} | region for j in range(i % 3)
            ],
        }
        for i in range(num_images, 0, -1)  # another order than the images
    ]
    return _json(tmp_path / "region_descriptions.json", regions), _json(tmp_path / "image_data.json", images)


@pytest.mark.parametrize("chunk", [1 << 20, 64, 1])
def test_visual_genome(tmp_path: Path, png: bytes, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(json_lists, "_CHUNK", chunk)  # catches an element lost where the stream is cut
    regions, images = _visual_genome(tmp_path, 8)
    folder = _images(tmp_path / "vg", png, "VG_100K_2/7.jpg", "VG_100K/8.jpg")
    source = read_visual_genome(regions, images, folder)
    assert _captions(source) == [f"phrase {j}, ]}} {i}" for i in range(8, 0, -1) for j in range(i % 3)]
    assert _image_names(source)[:3] == ["VG_100K/8.jpg", "VG_100K/8.jpg", "VG_100K_2/7.jpg"]
    assert source.image(2).mode == "RGB"
    with pytest.raises(BrokenRecordError, match=r"VG_100K_2/5\.jpg.*No such file"):
        source.image(3)


def test_a_cut_off_list_is_refused(tmp_path: Path) -> None:
    regions, images = _visual_genome(tmp_path, 8)
    Path(regions).write_text(Path(regions).read_text()[:-1])
    with pytest.raises(ConfigError, match=r"region_descriptions\.json .*truncated"):
        read_visual_genome(regions, images, str(tmp_path))


@pytest.mark.parametrize("form", ["txt", "json"])
def test_sbu(tmp_path: Path, png: bytes, form: str) -> None:
    captions = ["Boy on a swing", "A line\u2028separator inside", "My cat", "The sea"]
    if form == "json":
        content = {"image_urls": ["http://example.org"] * 4, "captions": captions}
        path = _json(tmp_path / "sbu.json", content)
    else:
        path = str(tmp_path / "SBU_captioned_photo_dataset_captions.txt")
        Path(path).write_text("\n".join(captions) + "\n")
    folder = _images(
        tmp_path / "images", png, "0003.jpg", "a/1.png", "b/0000000001.jpg", "thumb.jpg", "77.jpg", "0.jpg"
    )
    source = read_sbu_captions(path, folder)
    assert _captions(source) == [captions[0], captions[1], captions[3]]  # catches names sorted as text
    assert _image_names(source) == ["0.jpg", "a/1.png", "0003.jpg"]
    assert source.skipped == {
        "row without an image": (1, "row 2"),
        "second image of a row": (1, "b/0000000001.jpg"),
        "image not named by a number": (1, "thumb.jpg"),
        "image without a row": (1, "77.jpg"),
    }


Rows = list[tuple[str, str]]
ROWS: Rows = [
    ("a very typical bus station", "http://lh6.ggpht.com/a.jpg"),
    ("sierra looked stunning", "https://b.de/b"),
]


@pytest.mark.parametrize("columns", ["caption_url", "url_caption"])
def test_conceptual_captions(tmp_path: Path, png: bytes, columns: str) -> None:
    rows = [row if columns == "caption_url" else row[::-1] for row in ROWS]
    lines = ["\t".join(row).encode() for row in rows]
    lines[1:1] = [b"no tab", b"caf\xe9\thttp://c" if columns == "caption_url" else b"http://c\tcaf\xe9"]
    (tmp_path / "train.tsv").write_bytes(b"\r\n".join(lines))
    folder = _images(tmp_path / "images", png, *(f"{i}.jpg" for i in range(4)))
    source = read_conceptual_captions(str(tmp_path / "train.tsv"), folder, columns)  # type: ignore[arg-type]
    assert _image_names(source) == ["0.jpg", "2.jpg", "3.jpg"]
    assert [source.caption(i) for i in (0, 2)] == [ROWS[0][0], ROWS[1][0]]
    with pytest.raises(BrokenRecordError, match="broken caption"):
        source.caption(1)
    assert source.skipped == {"row without two columns": (1, "row 1")}
    other = "url_caption" if columns == "caption_url" else "caption_url"
    with pytest.raises(ConfigError, match=r"train\.tsv .*is not a URL"):
        read_conceptual_captions(str(tmp_path / "train.tsv"), folder, other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b'{"images": 3}', b'{"images": [], "annotations": [3]}', b"\xff\xfe", b"[" * 99999],
)
def test_other_files_are_refused_with_the_form_that_is_meant(tmp_path: Path, png: bytes, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    _images(tmp_path, png, "0.jpg")
    readers: list[Callable[[], AnnotatedImages]] = [
        lambda: read_coco_captions(str(path), str(tmp_path)),
        lambda: read_sbu_captions(str(path), str(tmp_path)),
    ]
    if content != b"[]":
        readers.append(lambda: read_visual_genome(str(path), str(path), str(tmp_path)))
    for read in readers:
        with pytest.raises(ConfigError, match=r"x\.json cannot be read as "):
            read()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt.gz", gzip.compress(b"one\ntwo\n", mtime=0), "it holds gzip data: unpack it first"),
        ("c.json.gz", gzip.compress(b'{"captions": ["one"]}', mtime=0), "it holds gzip data"),
        ("c.txt", "one\ntwo\n".encode("utf-16"), "it holds UTF-16 text: convert it to UTF-8 with iconv"),
        ("c.JSONL", b'{"caption": "one"}\n', "JSON with one object per line"),
    ],
)
def test_captions_of_another_kind_are_no_lines(
    tmp_path: Path, png: bytes, name: str, content: bytes, message: str
) -> None:
    """Catches compressed bytes or JSON that are read as captions."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_sbu_captions(str(tmp_path / name), _images(tmp_path / "images", png, "0.png"))


def test_json_of_captions_in_capital_letters(tmp_path: Path, png: bytes) -> None:
    folder = _images(tmp_path / "images", png, "0.png")
    assert _captions(read_sbu_captions(_json(tmp_path / "SBU.JSON", {"captions": ["one"]}), folder)) == ["one"]
