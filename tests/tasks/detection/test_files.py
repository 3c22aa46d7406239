"""Tests that COCO and Objects365 files are read, and that errors name the file and the id of a bad entry."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from beit3_ds.config import ConfigError, SourceConfig
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.tasks.detection.config import DetectionConfig
from beit3_ds.tasks.detection.files import AnnotatedObjects, read_objects
from beit3_ds.tasks.detection.samples import open_objects

SQUARE = [[2.0, 2.0, 12.0, 2.0, 12.0, 12.0, 2.0, 12.0]]


def _annotation(identifier: int, image: int, **changes: Any) -> dict[str, Any]:
    entry = {"id": identifier, "image_id": image, "category_id": 90, "bbox": [2, 2, 10, 10], "iscrowd": 0}
    return {**entry, "area": 100, "segmentation": SQUARE, **changes}


def _content() -> dict[str, Any]:
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 397133, "file_name": "a.png", "height": 20, "width": 30, "license": 3},
            {"id": 7, "file_name": "b.png", "height": 20, "width": 30},
            {"id": 12, "file_name": "c.png", "height": 20, "width": 30},
        ],
        "annotations": [
            _annotation(11, 12),
            _annotation(12, 397133, category_id=5, bbox=[1.5, 2.25, 20.0, 10.0]),
            _annotation(13, 397133, iscrowd=1, segmentation={"size": [20, 30], "counts": [590, 10]}),
            _annotation(14, 397133, segmentation={"size": [20, 30], "counts": [100, 50, 450]}),
            _annotation(15, 12, bbox=[5, 5, 0, 3]),
            _annotation(16, 12, bbox=[28, 15, 9.5, 3]),
            _annotation(17, 12, segmentation=[]),
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 5, "name": "airplane", "supercategory": "vehicle"}],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in "abc":
        Image.new("RGB", (30, 20)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def _read(folder: Path, content: dict[str, Any], *, with_masks: bool = True) -> AnnotatedObjects:
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return read_objects(str(path), str(folder / "images"), with_masks=with_masks)


@pytest.mark.parametrize("order", [("images", "annotations", "categories"), ("categories", "annotations", "images")])
def test_objects_are_sorted_by_image(folder: Path, order: tuple[str, ...]) -> None:
    content = _content()
    opened = pickle.loads(pickle.dumps(_read(folder, {key: content[key] for key in order})))
    assert len(opened) == 3 and opened.has_annotations
    assert opened.categories.names == ["airplane", "toothbrush"]  # by id, whatever the order of the file
    first, none, last = (opened.objects(index) for index in range(3))
    assert [found.label for found in first] == [0, 1] and not none
    assert first[0].box.tolist() == [1.5, 2.25, 21.5, 12.25]
    assert first[1].segmentation is not None and first[1].segmentation.counts
    assert [found.box.tolist() for found in last] == [[2, 2, 12, 12], [28, 15, 30, 18]]
    assert opened.name(0).endswith("instances.json: image 397133 (a.png)")
    reasons = {reason: skipped.num_members for reason, skipped in opened.skipped.items()}
    assert reasons == {
        "crowd, which training leaves out": 1,
        "box without area inside its image": 1,
        "box that exceeds its image; it is clipped": 1,
        "object without a mask": 1,
    }
    assert opened.skipped["object without a mask"].example.endswith("instances.json: annotation 17")


def test_the_ground_truth_is_that_of_the_file(folder: Path) -> None:
    images, annotations = _read(folder, _content()).ground_truth()
    assert images == _content()["images"] and annotations == _content()["annotations"]


def test_files_without_masks_or_annotations(folder: Path) -> None:
    """Checks files like those of Objects365, which have no masks, and a test split, which has no annotations."""
    content = _content()
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    assert sum(len(_read(folder, content, with_masks=False).objects(index)) for index in range(3)) == 5
    del content["annotations"]
    opened = _read(folder, content)
    assert not opened.has_annotations and not opened.objects(0) and len(opened) == 3


def test_paths_of_objects365_are_found_without_their_first_folders(folder: Path) -> None:
    content = _content()
    for image in content["images"]:
        image["file_name"] = f"images/v1/images/{image['file_name']}"
    path = folder / "zhiyuan.json"
    path.write_text(json.dumps(content))
    opened = read_objects(str(path), str(folder), with_masks=True)
    opened.check_images()
    assert opened.file_name(0) == "images/a.png" and opened.image(0).size == (30, 20)


Change = Callable[[dict[str, Any]], Any]
BAD: dict[str, tuple[Change, str]] = {
    "an unknown image": (lambda c: c["annotations"][0].update(image_id=99), "annotation 11 belongs to image 99"),
    "an unknown category": (lambda c: c["annotations"][1].update(category_id=6), "annotation 12 has category 6"),
    "a mask of another image": (
        lambda c: c["annotations"][3].update(segmentation={"size": [9, 9], "counts": [81]}),
        r"annotation 14: the mask has size \[9, 9\]",
    ),
    "an annotation id twice": (lambda c: c["annotations"][1].update(id=11), "occur twice, such as 11"),
    "an annotation id of 70 bits": (lambda c: c["annotations"][1].update(id=1 << 69), "has no valid id"),
    "true as an image id": (lambda c: c["images"][1].update(id=True), "has no valid id"),
    "a category id of 70 bits": (lambda c: c["categories"][1].update(id=1 << 69), "categories"),
    "an image id twice": (lambda c: c["images"][1].update(id=12), "image id 12 occurs twice"),
    "a category twice": (lambda c: c["categories"][0].update(id=5), "category 5 twice"),
    "a box of three numbers": (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "annotation 11 has no box"),
    "a box that is not finite": (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, 1e400]), "annotation 11 has no"),
    "no images": (lambda c: c.update(images=[]), "'images' is empty"),
    "no categories": (lambda c: c.update(categories=[]), "lists no categories"),
    "an image without a size": (lambda c: c["images"][0].update(height=0), "no valid id, file_name, height"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(name: str, folder: Path) -> None:
    content = copy.deepcopy(_content())
    BAD[name][0](content)
    with pytest.raises(ConfigError, match=BAD[name][1]) as error:
        _read(folder, content)
    assert "instances.json" in str(error.value)


def test_missing_images_are_named_before_the_run(folder: Path) -> None:
    (folder / "images" / "c.png").unlink()
    path = folder / "instances.json"
    path.write_text(json.dumps(_content()))
    source = SourceConfig(path=str(path), format="coco_objects", images=str(folder / "images"))
    with pytest.raises(ConfigError, match=r"lacks 1 of 3 images.*image 12 \(c.png\)"):
        open_objects(source, DetectionConfig(num_classes=2))


def test_an_image_of_another_size_or_of_too_many_pixels_is_a_broken_record(folder: Path) -> None:
    content = _content()
    content["images"][0] |= {"height": 30, "width": 20}
    content["images"][1] |= {"height": 20_000, "width": 20_000}
    content["annotations"] = []
    opened = _read(folder, content)
    assert "image of more than 89,478,485 pixels, which counts as broken" in opened.skipped
    with pytest.raises(BrokenRecordError, match=r"image 397133 \(a.png\).*30 x 20 pixels.*20 x 30"):
        opened.image(0)
