"""Tests sources: consecutive numbers, no file twice, and clear errors."""

import json
from pathlib import Path

import pytest
from PIL import Image

from beit3_ds.config import ConfigError, SourceConfig
from beit3_ds.data.images.folder import ImageFolder
from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.sources import ConcatSources, check_no_sample_twice, open_images
from tests.data.conftest import WriteTar


def test_samples_are_numbered_consecutively() -> None:
    sources = ConcatSources(["ab", "", "cde"])
    assert len(sources) == 5
    # catches an off-by-one at the borders, and an empty source
    assert [source[i] for source, i in map(sources.locate, range(5))] == list("abcde")


def test_a_file_of_two_sources_is_refused(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": png})
    with pytest.raises(ConfigError, match=r"a\.tar is listed twice"):
        check_no_sample_twice([SourceConfig(path=path), SourceConfig(path=str(tmp_path / "*.tar"))])


def test_images_open_by_their_format(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "0.png").write_bytes(png)
    captions = {"images": [{"id": 7, "file_name": "0.png"}], "annotations": [{"image_id": 7, "caption": "a coco"}]}
    regions = [{"id": 7, "regions": [{"phrase": "a region"}]}]
    files = {
        "coco": ("coco.json", json.dumps(captions)),
        "visual_genome": ("region_descriptions.json", json.dumps(regions)),
        "sbu": ("sbu_captions.txt", "a row\n"),
        "conceptual_captions": ("cc3m.tsv", "a caption\thttp://x/0.png\n"),
        "conceptual_12m": ("cc12m.tsv", "http://x/0.png\ta later caption\n"),
    }
    (tmp_path / "image_data.json").write_text(json.dumps([{"image_id": 7, "url": "http://x/folder/0.png"}]))
    expected = {"coco": "a coco", "visual_genome": "a region", "sbu": "a row"}
    expected |= {"conceptual_captions": "a caption", "conceptual_12m": "a later caption"}
    for form, (name, text) in files.items():
        (tmp_path / name).write_text(text)
        folder = tmp_path if form == "visual_genome" else tmp_path / "folder"  # its images are in folders of their own
        source = SourceConfig(path=str(tmp_path / name), format=form, images=str(folder))  # type: ignore[arg-type]
        images = open_images(source, None)
        assert [images.caption(i) for i in range(len(images))] == [expected[form]]
        assert images.image(0).size == Image.open(tmp_path / "folder" / "0.png").size
    tar = write_tar(tmp_path / "a.tar", {"a.png": png})
    assert isinstance(open_images(SourceConfig(path=tar), None), TarShards)
    assert isinstance(open_images(SourceConfig(path=str(tmp_path / "folder")), None), ImageFolder)


def test_annotations_need_the_folder_of_their_images() -> None:
    with pytest.raises(ConfigError, match="need the folder of their images"):
        SourceConfig(path="captions.json", format="coco")
    with pytest.raises(ConfigError, match=r"source 'a\.tar' has images='folder'.*tar, folder and texts have none"):
        SourceConfig(path="a.tar", images="folder")
