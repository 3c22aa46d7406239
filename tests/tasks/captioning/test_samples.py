"""Tests the samples of captioning: one per caption in training, and one per image in an evaluation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beit3_ds.config import ConfigError, RunConfig, build_run_config
from beit3_ds.data.samples import SampleKey
from beit3_ds.data.validation_overlap import describe_shared_images
from beit3_ds.sample_data.write_scenes import write_scenes
from beit3_ds.tasks.captioning.head import TARGET_IDS
from beit3_ds.tasks.captioning.packing import INDICES, NUM_MASKED, pack
from beit3_ds.tasks.captioning.samples import CaptionSamples, build_stream
from beit3_ds.tokenizers import TextTokenizer
from tests.run_config import small_run_mapping


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, num_train=4, num_validation=3, size=32)
    return folder


def config_of(used: str, **source: str) -> RunConfig:
    mapping = small_run_mapping(0, image_size=32)
    stream: dict[str, Any] = {"samples_per_step": 4, "train": [source] if used == "train" else ["x.tar"]}
    mapping["beit3_ds"]["data"] = {"pairs": stream | {used: [source]}, "text_length": 60, "pair_text_length": 60}
    return build_run_config(mapping)


def test_every_caption_is_a_training_sample(scenes: Path, tokenizer_files: dict[str, str]) -> None:
    tokenizer = TextTokenizer(tokenizer_files["text"])
    files = {"path": str(scenes / "captions.json"), "format": "karpathy", "images": str(scenes)}
    train = build_stream(config_of("train", **files, split="train"), tokenizer, 0.7, "train")["pairs"]
    val = build_stream(config_of("validation", **files, split="val"), tokenizer, 0.7, "validation")["pairs"]
    assert len(train) == 20 and len(val) == 3
    samples = [train.prepare(SampleKey(0, "pairs", 0, number)) for number in range(20)]
    image = next(image for image in json.loads((scenes / "captions.json").read_text())["images"])
    for sample, sentence in zip(samples, image["sentences"], strict=False):
        restored = sample.ids.copy()
        restored[sample.masked_positions] = sample.target_ids
        assert tokenizer.decode(restored[1:-1]) == sentence["raw"]
        assert abs(len(sample.masked_positions) - 0.7 * len(sample.ids)) < 1
    assert any(sample.masked_positions[-1] == len(sample.ids) - 1 for sample in samples)  # the end is predicted too
    assert not any(0 in sample.masked_positions for sample in samples)
    again = train.prepare(SampleKey(0, "pairs", 1, 3))
    assert (
        not np.array_equal(again.masked_positions, samples[3].masked_positions) or len(again.ids) < 8
    )  # another epoch, other words

    batch = pack(samples[:3], None, {}, config_of("train", **files, split="train").model)
    assert batch.causal_captions and batch.targets[INDICES].tolist() == [0, 1, 2]
    assert batch.targets[NUM_MASKED].sum() == len(batch.targets[TARGET_IDS]) == batch.term_counts[0]
    assert batch.head_rows is not None
    rows = batch.head_rows - batch.num_pairs * batch.image_length
    for row, target in zip(rows.tolist(), batch.targets[TARGET_IDS].tolist(), strict=True):
        assert int(batch.token_ids[row]) in (tokenizer.mask_id, target) or int(batch.token_ids[row]) >= 4


def test_a_test_split_needs_no_captions(tokenizer_files: dict[str, str], scenes: Path, tmp_path: Path) -> None:
    tokenizer = TextTokenizer(tokenizer_files["text"])
    path = tmp_path / "test.json"
    path.write_text(json.dumps({"images": [{"id": 7, "file_name": "images/train/000000.png"}]}))
    files = {"path": str(path), "format": "coco_images", "images": str(scenes)}
    stream = build_stream(config_of("test", **files), tokenizer, 0.7, "test")["pairs"]
    sample = stream.prepare(SampleKey(0, "pairs", 0, 0))
    assert sample.ids.tolist() == [tokenizer.bos_id, tokenizer.eos_id] and not len(sample.masked_positions)
    source, _ = stream.sources.locate(0)
    assert isinstance(source, CaptionSamples) and source.identifier(0) == 7 and source.captions(0) == []
    with pytest.raises(ConfigError, match="image 7 has no captions"):
        build_stream(config_of("validation", **files), tokenizer, 0.7, "validation")


def test_a_missing_image_is_named(scenes: Path, tokenizer_files: dict[str, str], tmp_path: Path) -> None:
    files = {"path": str(scenes / "captions.json"), "format": "karpathy", "images": str(tmp_path), "split": "val"}
    with pytest.raises(ConfigError, match=r"lacks 3 of 3 images"):
        build_stream(config_of("validation", **files), TextTokenizer(tokenizer_files["text"]), 0.7, "validation")


def test_shared_images_are_counted(scenes: Path, tokenizer_files: dict[str, str], tmp_path: Path) -> None:
    """Catches a count of shared images that misses images behind captions, or counts different images as shared."""
    tokenizer, lines = TextTokenizer(tokenizer_files["text"]), tmp_path / "own.jsonl"
    names = ["images/train/000000.png", "images/validation/000000.png"]
    lines.write_text("\n".join(json.dumps({"image": name, "caption": "a ring"}) for name in names))
    karpathy = {"path": str(scenes / "captions.json"), "format": "karpathy", "images": str(scenes), "split": "train"}
    own = {"path": str(lines), "format": "caption_lines", "images": str(scenes)}
    train = build_stream(config_of("train", **karpathy), tokenizer, 0.7, "train")["pairs"]
    validation = build_stream(config_of("validation", **own), tokenizer, 0.7, "validation")["pairs"]
    (line,) = describe_shared_images({"train": train.sources, "validation": validation.sources})
    assert line.startswith("WARNING: 1 of 2 images of validation are also images of train, such as")
    assert validation.name(1).startswith(f"{lines}:2 ")  # lines count from 1, samples from 0
