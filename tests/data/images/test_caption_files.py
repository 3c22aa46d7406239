"""Tests files that give images identifiers and captions.

The fixtures follow the published descriptions of the formats. The official files were never read.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beit3_ds.config import ConfigError
from beit3_ds.data.images.caption_files import read_caption_lines, read_captions, read_coco_images, read_karpathy
from beit3_ds.data.images.captioned import CaptionedImages
from beit3_ds.sample_data.write_scenes import write_scenes


def karpathy(number: int, split: str, *captions: str, folder: str = "val2014") -> dict[str, Any]:
    sentences = [{"raw": text, "tokens": text.split(), "imgid": number, "sentid": i} for i, text in enumerate(captions)]
    name = f"COCO_{folder}_{1000 + 7 * number:012}.jpg"
    facts = {"filepath": folder, "filename": name, "imgid": number, "cocoid": 1000 + 7 * number}
    return {**facts, "split": split, "sentids": list(range(len(captions))), "sentences": sentences}


def write(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def images(samples: CaptionedImages) -> dict[int | str, tuple[str, list[str]]]:
    return {samples.identifier(i): (samples.paths[i], samples.references(i)) for i in range(samples.num_images)}


COCO = [
    karpathy(0, "test", "A man. ", "A person."),
    karpathy(1, "restval", "A dog.", "A cat."),
    karpathy(2, "train", "A bus.", folder="train2014"),
    karpathy(3, "val", "A hat.", "A cap."),
]


def test_karpathy(tmp_path: Path) -> None:
    path = write(tmp_path / "dataset_coco.json", {"images": COCO, "dataset": "coco"})
    train = pickle.loads(pickle.dumps(read_karpathy(path, str(tmp_path), "train")))
    assert images(train) == {  # catches a training split without restval
        1007: ("val2014/COCO_val2014_000000001007.jpg", ["A dog.", "A cat."]),
        1014: ("train2014/COCO_train2014_000000001014.jpg", ["A bus."]),
    }
    assert [train.caption(index) for index in range(len(train))] == ["A dog.", "A cat.", "A bus."]
    test = read_karpathy(path, str(tmp_path), "test").each_image()
    assert len(test) == 1 and test.identifier(0) == 1000 and test.references(0) == ["A man.", "A person."]
    assert len(read_karpathy(path, str(tmp_path), "restval")) == 2
    with pytest.raises(ConfigError, match=r"no image of the split 'dev'.*restval \(1 images\), test \(1 images\)"):
        read_karpathy(path, str(tmp_path), "dev")


def test_flickr_has_no_folder_and_no_cocoid(tmp_path: Path) -> None:
    entry = {key: value for key, value in COCO[2].items() if key not in ("filepath", "cocoid")}
    path = write(tmp_path / "flickr.json", {"images": [entry], "dataset": "flickr30k"})
    assert images(read_karpathy(path, str(tmp_path), "train")) == {2: ("COCO_train2014_000000001014.jpg", ["A bus."])}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([COCO[0], COCO[0]], r"entry 1 of 'images': the image id 1000 occurs twice \(first in entry 0"),
        ([karpathy(0, "test", "A man.", " ")], r"entry 0 of 'images': caption 1 of image 1000 is broken: empty"),
        ([{"split": "test"}], r"cannot be read as .*KeyError: 'imgid'"),
    ],
)
def test_wrong_entries_are_named(tmp_path: Path, entries: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_karpathy(write(tmp_path / "d.json", {"images": entries}), str(tmp_path), "test")


def test_nocaps(tmp_path: Path) -> None:
    rows = [{"id": i, "file_name": f"{i:x}a.jpg", "open_images_id": f"{i:x}a", "domain": "near-domain"} for i in (4, 0)]
    captions = [{"image_id": i, "id": n, "caption": text} for n, (i, text) in enumerate([(0, "a"), (4, "b"), (0, "c")])]
    val = read_coco_images(write(tmp_path / "val.json", {"annotations": captions, "images": rows}), str(tmp_path))
    assert images(val) == {4: ("4a.jpg", ["b"]), 0: ("0a.jpg", ["a", "c"])}
    val.each_image().check_has_references()
    test = read_coco_images(write(tmp_path / "test.json", {"images": rows}), str(tmp_path)).each_image()
    assert [test.identifier(index) for index in range(2)] == [4, 0] and test.references(1) == []
    with pytest.raises(ConfigError, match=r"test\.json: image 4 has no captions.*scored"):
        test.check_has_references()
    with pytest.raises(ConfigError, match="entry 0 of 'annotations' describes image 0, which is not in"):
        read_coco_images(write(tmp_path / "val.json", {"annotations": captions, "images": rows[:1]}), str(tmp_path))


def test_lines(tmp_path: Path) -> None:
    lines = [{"image": "a.png", "captions": ["x", "y"], "id": 3}, {"image": "b/c.png", "caption": "z"}]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert images(read_caption_lines(str(path), str(tmp_path))) == {
        3: ("a.png", ["x", "y"]),
        "b/c.png": ("b/c.png", ["z"]),
    }
    for line, message in (
        ({"image": "a.png", "captions": "x"}, r"own\.jsonl:1: 'captions' must be a list of texts"),
        ({"image": "a.png", "captions": ["x", 3]}, r"own\.jsonl:1: caption 1 of image 'a\.png' is broken"),
        ({"image": "a.png", "id": None}, r"own\.jsonl:1: the id None is neither"),
    ):
        path.write_text(json.dumps(line))
        with pytest.raises(ConfigError, match=message):
            read_caption_lines(str(path), str(tmp_path))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.lists(st.tuples(st.sampled_from(["train", "restval", "val", "test"]), st.integers(0, 3)), min_size=1))
def test_any_mix_of_splits(entries: list[tuple[str, int]], tmp_path: Path) -> None:
    content = [karpathy(i, split, *[f"c{i}-{n}" for n in range(count)]) for i, (split, count) in enumerate(entries)]
    path = write(tmp_path / "d.json", {"images": content})
    for split, kept in (("train", {"train", "restval"}), ("val", {"val"}), ("test", {"test"})):
        expected = {
            entry["cocoid"]: [s["raw"] for s in entry["sentences"]] for entry in content if entry["split"] in kept
        }
        if expected:
            samples = read_karpathy(path, str(tmp_path), split)
            assert {key: captions for key, (_, captions) in images(samples).items()} == expected
            assert [samples.captions[i] for i in range(len(samples))] == [
                caption for captions in expected.values() for caption in captions
            ]
            for image in range(samples.num_images):
                assert {samples.image_numbers[i] for i in samples.samples_of(image)} <= {image}


def test_drawn_scenes_are_karpathy_splits(tmp_path: Path) -> None:
    write_scenes(tmp_path, num_train=3, num_validation=2, size=16)
    path = str(tmp_path / "captions.json")
    train = read_captions(path, str(tmp_path), "karpathy", "train")
    assert (train.num_images, len(train)) == (3, 15) and train.image(14).size == (16, 16)
    assert read_captions(path, str(tmp_path), "karpathy", "val").num_images == 2


def test_a_test_split_may_lack_captions(tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}]}))
    assert read_captions(str(path), str(tmp_path), "coco_images", "", needs_captions=False).num_images == 1
    with pytest.raises(ConfigError, match="image 1 has no captions"):
        read_captions(str(path), str(tmp_path), "coco_images", "")
    with pytest.raises(ConfigError, match="split='val' must be left out"):
        read_captions(str(path), str(tmp_path), "coco_images", "val")
