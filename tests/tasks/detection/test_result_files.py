"""Result files in COCO's format are scored without a model, and bad entries are named with file and image."""

import copy
import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval import mask as coco_masks

from beit3_ds.cli.main import main
from beit3_ds.sample_data.object_scenes import run_lengths
from tests.run_config import small_run_mapping
from tests.tasks.fine_tuning import write_json

SIZE = [120, 160]
SQUARES = {3: [[10, 10, 20, 20], [60, 20, 50, 40]], 7: [[5, 5, 100, 100]], 20: []}
"""Boxes of the objects of each image: small, medium and large ones."""
CATEGORIES = {1: "cat", 4: "dog"}


def _mask(box: list[int]) -> np.ndarray[Any, Any]:
    left, top, width, height = box
    mask = np.zeros(SIZE, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def _compressed(box: list[int]) -> dict[str, Any]:
    encoded = coco_masks.encode(np.asfortranarray(_mask(box).astype(np.uint8)))
    return {"size": SIZE, "counts": encoded["counts"].decode()}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a configuration whose split "validation" has annotations but no images."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "images").mkdir()
    images = [{"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in SQUARES]
    annotations = [
        {
            **{"id": 10 * image + place, "image_id": image, "category_id": 1 if place else 4, "bbox": box},
            **{"iscrowd": 0, "area": box[2] * box[3]},
            "segmentation": {"size": SIZE, "counts": run_lengths(_mask(box))},
        }
        for image, boxes in SQUARES.items()
        for place, box in enumerate(boxes)
    ]
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": identifier, "name": name} for identifier, name in CATEGORIES.items()]
    (folder / "instances.json").write_text(json.dumps(content))
    mapping = small_run_mapping(0)
    own = mapping["beit3_ds"]
    own["task"] = {"name": "detection", "num_classes": 2}
    own["model"] |= {"inputs": ["images"], "patch_size": 16, "image_size": 64, "dense": {}}
    source = {"path": str(folder / "instances.json"), "format": "coco_objects", "images": str(folder / "images")}
    own["data"] = {"images": {"train": [source], "validation": [source], "samples_per_step": 1}}
    own["tokenizers"] = {}
    own["training"] |= {"output_dir": str(folder / "run")}
    return write_json(folder, mapping)


def _entries(**members: Callable[[list[int]], Any]) -> list[dict[str, Any]]:
    """Returns a detection of every object."""
    return [
        {"image_id": image, "category_id": 1 if place else 4, "score": 0.9 - 0.1 * place}
        | {name: member(box) for name, member in members.items()}
        for image, boxes in SQUARES.items()
        for place, box in enumerate(boxes)
    ]


def _score(config: Path, folder: Path, *contents: Any) -> int:
    arguments = []
    for number, content in enumerate(contents):
        path = folder / f"results-{number}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        arguments += ["--results", str(path)]
    return main(["evaluate", str(config), *arguments, "--out", str(folder / "out")])


def _metrics(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "out" / "metrics.json").read_text())["metrics"]
    return found


def test_exact_boxes_and_masks_score_one(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _score(config, tmp_path, _entries(bbox=list), _entries(segmentation=_compressed)) == 0
    metrics = _metrics(tmp_path)
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR")
    assert set(metrics) == {f"{kind}_{name}" for kind in ("box", "mask") for name in names}
    assert all(value == pytest.approx(1) for value in metrics.values())
    rows = list(csv.DictReader((tmp_path / "out" / "classes.csv").read_text().splitlines()))
    assert [row["category"] for row in rows] == ["cat", "dog"] and [row["objects"] for row in rows] == ["1", "2"]
    assert rows[0]["box_AP_small"] == "" and float(rows[1]["box_AP_small"]) == pytest.approx(1)
    printed = capsys.readouterr().out
    assert "detection on validation, results" in printed and "box_AP_large" in printed


def test_entries_with_box_and_mask_count_as_both(config: Path, tmp_path: Path) -> None:
    """Catches masks whose size is taken from their box: these boxes are large, their masks are not."""
    entries = _entries(bbox=lambda box: [0, 0, 160, 120], segmentation=_compressed)
    assert _score(config, tmp_path, entries) == 0
    metrics = _metrics(tmp_path)
    assert metrics["mask_AP"] == metrics["mask_AP_small"] == pytest.approx(1) and metrics["box_AP_small"] < 0.5


def test_a_missed_object_and_wrong_boxes_lower_the_scores(config: Path, tmp_path: Path) -> None:
    entries = _entries(bbox=list)
    entries[-1]["bbox"] = [0, 0, 10, 10]
    assert _score(config, tmp_path, entries) == 0
    metrics = _metrics(tmp_path)
    assert metrics["box_AP_large"] == 0 and metrics["box_AP_medium"] == pytest.approx(1) and "mask_AP" not in metrics


def test_uncompressed_run_lengths_are_read(config: Path, tmp_path: Path) -> None:
    counts = _entries(segmentation=lambda box: {"size": SIZE, "counts": run_lengths(_mask(box))})
    assert _score(config, tmp_path, counts) == 0
    assert _metrics(tmp_path)["mask_AP"] == pytest.approx(1)


def _changed(**changes: Any) -> list[dict[str, Any]]:
    entries = copy.deepcopy(_entries(bbox=list))
    entries[1] |= changes
    return entries


def _masks(**changes: Any) -> list[dict[str, Any]]:
    entries = copy.deepcopy(_entries(segmentation=_compressed))
    entries[1]["segmentation"] |= changes
    return entries


BAD: dict[str, tuple[Any, str]] = {
    "another image": (_changed(image_id=4), r"entry 2 \(image 4\): image 4 is none of the 3 images of the split"),
    "an id as text": (_changed(image_id="3"), r"entry 2 \(image 3\): it has no whole numbers"),
    "a category": (_changed(category_id=9), r"entry 2 \(image 3\): category 9 is none of the 2 categories"),
    "no score": (_changed(score=None), r"entry 2 \(image 3\): 'score' is no finite number"),
    "a score beyond floats": (_changed(score=10**400), r"entry 2 \(image 3\): 'score' is no finite number"),
    "a score that is NaN": (_changed(score=float("nan")), r"entry 2 \(image 3\): 'score' is no finite number: nan"),
    "three numbers": (_changed(bbox=[1, 2, 3]), r"entry 2 \(image 3\): 'bbox' is no list of four finite numbers"),
    "an infinite box": (_changed(bbox=[1, 2, 3, float("inf")]), r"entry 2 \(image 3\): 'bbox' is no list of four"),
    "a negative width": (_changed(bbox=[1, 2, -3, 4]), r"entry 2 \(image 3\): 'bbox' has a negative width"),
    "another member": (
        [*_entries(bbox=list), *_entries(segmentation=_compressed)],
        r"entry 4 \(image 3\): it must have 'bbox', as",
    ),
    "neither box nor mask": (_entries(), r"entry 1 \(image 3\): it must have 'bbox' or 'segmentation'"),
    "a mask of another size": (_masks(size=[160, 120]), r"entry 2 \(image 3\): the mask has size \[160, 120\]"),
    "run lengths that are cut off": (_masks(counts="abc"), r"entry 2 \(image 3\): .*(cut off|add up)"),
    "run lengths with other letters": (_masks(counts="a~b"), r"entry 2 \(image 3\): .*the character '~'"),
    "too few pixels": (_masks(counts=[5, 5]), r"entry 2 \(image 3\): run lengths add up to 10"),
    "polygons": (
        _entries(segmentation=lambda box: [[1, 1, 9, 1, 9, 9]]),
        r"entry 1 \(image 3\): 'segmentation' is no object",
    ),
    "a number": ([5], "entry 1: it is no object: 5"),
    "an object": ({"annotations": []}, "cannot be read as COCO's result file"),
    "a cut file": ('[{"image_id": 3, ', "cannot be read as COCO's result file.*truncated"),
    "an empty list": ([], "is an empty list, so nothing can be scored"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(name: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _score(config, tmp_path, BAD[name][0]) == 2
    error = capsys.readouterr().err
    assert re.search(BAD[name][1], error) and "results-0.json" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_two_files_with_boxes_and_options_of_weights_are_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _score(config, tmp_path, _entries(bbox=list), _entries(bbox=list)) == 2
    assert re.search(r"results-0\.json and .*results-1\.json have 'bbox'", capsys.readouterr().err)
    assert main(["evaluate", str(config), "--results", "r.json", "--split", "test"]) == 2
    assert "no stream has sources in 'test'" in capsys.readouterr().err
    assert main(["evaluate", str(config), "--results", "r.json", "--ema"]) == 2
    assert "--ema and --best choose among the weights" in capsys.readouterr().err
    assert main(["evaluate", str(config), "--results", str(tmp_path / "missing.json")]) == 2
    assert "missing.json" in capsys.readouterr().err


def test_a_split_without_annotations_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping = json.loads(config.read_text())
    content = json.loads((config.parent / "instances.json").read_text())
    del content["annotations"]
    (tmp_path / "test.json").write_text(json.dumps(content))
    images = mapping["beit3_ds"]["data"]["images"]
    images["test"] = [images["validation"][0] | {"path": str(tmp_path / "test.json")}]
    path = write_json(tmp_path, mapping)
    results = tmp_path / "results.json"
    results.write_text(json.dumps(_entries(bbox=list)))
    assert main(["evaluate", str(path), "--results", str(results), "--split", "test"]) == 2
    assert "test has no annotations, so nothing can be scored" in capsys.readouterr().err
