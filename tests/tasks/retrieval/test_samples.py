"""Tests pairs of all formats: the caption of an epoch, which images count as equal, and which are not flipped."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit3_ds.config import ConfigError, RunConfig, build_run_config
from beit3_ds.data.samples import SampleKey
from beit3_ds.tasks.retrieval.samples import RetrievalSample, build_stream, caption_of_epoch, open_sources
from beit3_ds.tokenizers import TextTokenizer
from tests.fixtures.tokenizers import copy_tokenizers
from tests.tasks.retrieval.runs import write_config


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes three images whose left half is red; the captions of the last image name a side."""
    folder = tmp_path_factory.mktemp("pairs")
    copy_tokenizers(folder)
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:, :16, 0] = 255
    for number in range(3):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    lines = [
        {"image": "0.png", "id": 70, "captions": ["a red half", "half a square", "something red"]},
        {"image": "1.png", "id": 71, "caption": "a red half"},
        {"image": "2.png", "id": 72, "captions": ["red on the left", "black on the RIGHT"]},
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(3)]
    captions = [{"image_id": number, "id": i, "caption": f"caption {i}"} for i, number in enumerate((0, 0, 1, 2))]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return folder


def config_of(files: Path, folder: Path, name: str, kind: str) -> RunConfig:
    source = {"path": str(files / name), "images": str(files), "format": kind}
    augmentation = {"min_crop_scale": 1.0, "color_jitter": 0, "rand_augment_operations": 0}
    pairs = {"pairs": {"train": [source], "samples_per_step": 2, "validation": []}}
    path = write_config(files, folder, data=pairs | augmentation)
    return build_run_config(json.loads(path.read_text()))


def read(config: RunConfig, files: Path, epoch: int) -> list[RetrievalSample]:
    stream = build_stream(config, open_sources(config.data, "train"), TextTokenizer(files / "text.spm"), "train")
    return [stream.prepare(SampleKey(1, "pairs", epoch, index)) for index in range(len(stream))]


def test_every_caption_comes_once_in_as_many_epochs_as_there_are() -> None:
    for around in range(4):
        keys = [SampleKey(1, "pairs", 5 * around + place, 3) for place in range(5)]
        assert sorted(caption_of_epoch(5, key) for key in keys) == list(range(5))
    orders = {
        tuple(caption_of_epoch(5, SampleKey(1, "pairs", place, index)) for place in range(5)) for index in range(9)
    }
    assert len(orders) > 5  # samples have orders of their own


def test_training_draws_one_caption_and_equal_captions_have_equal_numbers(files: Path, tmp_path: Path) -> None:
    config = config_of(files, tmp_path, "pairs.jsonl", "caption_lines")
    epochs = [read(config, files, epoch) for epoch in range(3)]
    assert all(len(sample.texts) == 1 for epoch in epochs for sample in epoch)
    assert len({epoch[0].text_ids for epoch in epochs}) == 3
    assert sum(epoch[0].text_ids == epoch[1].text_ids for epoch in epochs) == 1  # both say "a red half" once
    assert len({sample.image_id for sample in epochs[0]}) == 3
    assert epochs[0][0].image_id == epochs[1][0].image_id


def test_captions_that_name_a_side_are_not_flipped(files: Path, tmp_path: Path) -> None:
    """Checks that epochs flip about half of the images, but none whose caption says left or right."""
    config = config_of(files, tmp_path, "pairs.jsonl", "caption_lines")
    is_flipped = torch.tensor(
        [[bool(sample.view[0, 16, 4] < 0) for sample in read(config, files, epoch)] for epoch in range(12)]
    )
    assert is_flipped[:, :2].any() and not is_flipped[:, :2].all() and not is_flipped[:, 2].any()


def test_captions_of_one_image_share_its_number(files: Path, tmp_path: Path) -> None:
    """Checks that captions of one image share an image number, also in formats with one sample per caption."""
    samples = read(config_of(files, tmp_path, "coco.json", "coco"), files, 0)
    assert [len(sample.texts) for sample in samples] == [1, 1, 1, 1]
    ids = [sample.image_id for sample in samples]
    assert ids[0] == ids[1] and len(set(ids)) == 3
    several = read(config_of(files, tmp_path, "coco.json", "coco_images"), files, 0)
    assert [sample.image_id for sample in several] == sorted(set(ids), key=ids.index)


def test_a_split_without_captions_is_refused(files: Path, tmp_path: Path) -> None:
    (files / "no_captions.jsonl").write_text(json.dumps({"image": "0.png"}))
    config = config_of(files, tmp_path, "no_captions.jsonl", "caption_lines")
    with pytest.raises(ConfigError, match=r"image '0\.png' has no captions"):
        open_sources(config.data, "train")


def test_a_missing_image_is_named_before_training(files: Path, tmp_path: Path) -> None:
    (files / "missing.jsonl").write_text(json.dumps({"image": "9.png", "caption": "nothing"}))
    config = config_of(files, tmp_path, "missing.jsonl", "caption_lines")
    with pytest.raises(ConfigError, match=r"lacks 1 of 1 images.*missing\.jsonl:1 \(9\.png\)"):
        open_sources(config.data, "train")
