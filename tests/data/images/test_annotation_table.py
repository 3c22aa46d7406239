"""Tests that memory-mapped tables of annotations give the samples of parsing, and that changes are noticed."""

import json
import os
import pickle
from pathlib import Path

import pytest

from beit3_ds.config import ConfigError, DataConfig, SourceConfig, StreamConfig
from beit3_ds.data import sources
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.images.annotated import AnnotatedImages
from beit3_ds.data.prepare.annotations import prepare_annotations
from beit3_ds.data.sources import open_images, read_annotations, source_table

CAPTIONS = ["A giraffe.", " two\nlines ", "", "caf\u00e9 \U0001f426", "half \ud800", "the last"]


@pytest.fixture
def data(tmp_path: Path, png: bytes) -> DataConfig:
    """Configures all five annotation formats over one folder of images, with valid, broken and skipped samples."""
    (tmp_path / "images").mkdir()
    for name in ("0.png", "00002.png", "thumb.png"):
        (tmp_path / "images" / name).write_bytes(png)
    files = [{"id": 7, "file_name": "0.png"}, {"id": 8, "file_name": "gone.png"}, {"id": 7, "file_name": "x.png"}]
    rows = [{"image_id": 7 + i % 3, "caption": caption} for i, caption in enumerate(CAPTIONS)]
    regions = [{"id": 7, "regions": [{"phrase": caption} for caption in CAPTIONS]}]
    contents = {
        "coco": json.dumps({"images": files, "annotations": rows}),
        "visual_genome": json.dumps(regions),
        "sbu": "a row\nno image\nanother\n",
        "conceptual_captions": "a caption\thttp://x\nno tab\ncaf\u00e9\thttp://y\n",
        "conceptual_12m": "http://x\ta caption\n",
    }
    (tmp_path / "image_data.json").write_text(json.dumps([{"image_id": 7, "url": "http://x/images/0.png"}]))
    train = []
    for form, text in contents.items():
        (tmp_path / f"{form}.x").write_text(text)
        folder = tmp_path if form == "visual_genome" else tmp_path / "images"
        train.append(SourceConfig(path=str(tmp_path / f"{form}.x"), format=form, images=str(folder)))  # type: ignore[arg-type]
    none = StreamConfig(train=(), samples_per_step=0)
    pairs = StreamConfig(train=tuple(train), validation=(train[0],), samples_per_step=1)
    return DataConfig(images=none, pairs=pairs, texts=none, cache_dir=str(tmp_path / "prepared"))


def _samples(source: AnnotatedImages) -> list[tuple[str, str]]:
    def caption(index: int) -> str:
        try:
            return source.caption(index)
        except BrokenRecordError as error:
            return str(error)

    return [(source.name(i), caption(i)) for i in range(len(source))]


def test_tables_hold_what_parsing_gives(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = [read_annotations(source) for source in data.pairs.train]
    done, *missing = prepare_annotations(data).splitlines()
    assert done == "5 annotation files with 17 samples: 5 tables written, 0 verified"
    assert [line.partition(": ")[2][:29] for line in missing] == ["1 of 2 images are missing in "]
    # catches a table that is written but not used
    monkeypatch.setattr(sources, "read_annotations", lambda source: pytest.fail("parsed"))
    for source, expected in zip(data.pairs.train, parsed, strict=True):
        opened = open_images(source, data.cache_dir)
        for stored in (opened, pickle.loads(pickle.dumps(opened))):
            assert isinstance(stored, AnnotatedImages)
            assert _samples(stored) == _samples(expected)
            assert stored.skipped == expected.skipped
            assert stored.image(0).size == expected.image(0).size
            with pytest.raises(IndexError):
                stored.captions[-1]


def test_copies_map_the_table_again(data: DataConfig) -> None:
    path = Path(data.pairs.train[2].path)
    path.write_text("a row of some words\n" * 9999)
    folder = Path(data.pairs.train[2].images)
    for row in range(200):
        (folder / f"{row}.jpg").write_bytes(b"")
    prepare_annotations(data)
    # catches a map that is pickled as what it shows: each worker would hold all captions
    assert len(pickle.dumps(open_images(data.pairs.train[2], data.cache_dir))) < 1000


@pytest.mark.parametrize("name", ["coco.x", "image_data.json", "sbu.x"])
def test_a_changed_annotation_file_is_named(data: DataConfig, tmp_path: Path, name: str) -> None:
    prepare_annotations(data)
    os.utime(tmp_path / name, ns=(1, 1))
    number = {"coco.x": 0, "image_data.json": 1, "sbu.x": 2}[name]
    with pytest.raises(ConfigError, match=rf"{name} has size .*, its table .*beit3 prepare index"):
        open_images(data.pairs.train[number], data.cache_dir)
    prepare_annotations(data)
    assert len(open_images(data.pairs.train[number], data.cache_dir))


def test_verify_finds_other_annotations_and_images(data: DataConfig, tmp_path: Path, png: bytes) -> None:
    prepare_annotations(data)
    assert ": 0 tables written, 5 verified" in prepare_annotations(data, verify=True)
    path, status = tmp_path / "coco.x", (tmp_path / "coco.x").stat()
    path.write_text(path.read_text().replace("giraffe", "graffiy"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ConfigError, match=r"coco\.x or the images in .* no longer fit the table"):
        prepare_annotations(data, verify=True)
    prepare_annotations(data)
    (tmp_path / "images" / "1.png").write_bytes(png)
    with pytest.raises(ConfigError, match=r"sbu\.x or the images in .* no longer fit the table"):
        prepare_annotations(data, verify=True)
    assert len(open_images(data.pairs.train[2], data.cache_dir)) == 2
    prepare_annotations(data)
    assert len(open_images(data.pairs.train[2], data.cache_dir)) == 3  # catches a table that is kept


def test_a_damaged_table_is_named(data: DataConfig) -> None:
    prepare_annotations(data)
    source = data.pairs.train[0]
    assert data.cache_dir is not None
    path = Path(source_table(source, data.cache_dir))
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:20], b"[]\n", b"{}\n", whole.replace(b'"format": 1', b'"format": 9')):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=rf"{path.name} of .* is damaged"):
            open_images(source, data.cache_dir)
    path.unlink()
    assert len(open_images(source, data.cache_dir)) == len(CAPTIONS)  # without a table it parses


def test_without_annotation_files_nothing_is_done(data: DataConfig, tmp_path: Path) -> None:
    none = StreamConfig(train=(), samples_per_step=0)
    assert prepare_annotations(DataConfig(images=none, pairs=none, texts=none, cache_dir=str(tmp_path / "p"))) == ""
    assert not (tmp_path / "p").exists()
