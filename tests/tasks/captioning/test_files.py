"""Opening of files with captions."""

import json
from pathlib import Path

import pytest

from beit3_ds.config import ConfigError
from beit3_ds.sample_data.write_scenes import write_scenes
from beit3_ds.tasks.captioning.files import open_captions


def test_drawn_scenes_are_karpathy_splits(tmp_path: Path) -> None:
    write_scenes(tmp_path, num_train=3, num_validation=2, size=16)
    path = str(tmp_path / "captions.json")
    train = open_captions(path, str(tmp_path), "karpathy", "train", with_captions=True)
    assert (train.num_images, len(train)) == (3, 15) and train.image(14).size == (16, 16)
    assert open_captions(path, str(tmp_path), "karpathy", "val", with_captions=True).num_images == 2


def test_a_test_split_may_lack_captions(tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}]}))
    assert open_captions(str(path), str(tmp_path), "coco_images", "", with_captions=False).num_images == 1
    with pytest.raises(ConfigError, match="image 1 has no captions"):
        open_captions(str(path), str(tmp_path), "coco_images", "", with_captions=True)
    with pytest.raises(ConfigError, match="split='val' must be left out"):
        open_captions(str(path), str(tmp_path), "coco_images", "val", with_captions=True)
