"""Tests that a statement is packed as two pairs, and that its images are not mirrored if it names a side."""

from pathlib import Path

import pytest
import torch

from beit3_ds.config import ConfigError, build_run_config
from beit3_ds.data.samples import SampleKey
from beit3_ds.sample_data.write_scenes import write_scenes
from beit3_ds.tasks.nlvr2.head import LABELS
from beit3_ds.tasks.nlvr2.samples import INDICES, StatementSamples, build_stream, pack
from beit3_ds.tokenizers import TextTokenizer
from tests.run_config import small_run_mapping


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, num_train=12, num_validation=2, size=32)
    return folder


def config_of(scenes: Path, **source: str):  # type: ignore[no-untyped-def]
    mapping = small_run_mapping(0, image_size=32)
    files = {"path": str(scenes / "statements-train.jsonl"), "format": "statement_lines", "images": str(scenes)}
    mapping["beit3_ds"]["data"] = {
        "pairs": {"train": [files | source], "samples_per_step": 4},
        **{
            "min_crop_scale": 1.0,
            "color_jitter": 0.0,
            "pair_flip_probability": 1.0,
            "pair_text_length": 24,
            "text_length": 24,
        },
    }
    return build_run_config(mapping)


def test_pairs_are_left_and_right(scenes: Path, tokenizer_files: dict[str, str]) -> None:
    config, tokenizer = config_of(scenes), TextTokenizer(tokenizer_files["text"])
    stream = build_stream(config, tokenizer, "train")["pairs"]
    samples = [stream.prepare(SampleKey(0, "pairs", 0, number)) for number in range(24)]
    ((source, _), *_) = [stream.sources.locate(0)]
    assert isinstance(source, StatementSamples)
    for sample in samples:
        sentence = source.statements.sentence(sample.sample_index)
        for side in (0, 1):
            image = source.statements.image(sample.sample_index, side)
            pixels = torch.tensor(list(image.getdata())).view(32, 32, 3).permute(2, 0, 1) / 127.5 - 1
            mirrored = pixels.flip(-1)
            expected = pixels if "left" in sentence or "right" in sentence else mirrored
            # catches a mirrored image whose statement speaks of sides, and images in the other order
            torch.testing.assert_close(sample.views[side], expected, atol=0.02, rtol=0)
    batch = pack(samples[:3], None, {}, config.model)
    assert batch.num_pairs == 6 and batch.targets[INDICES].tolist() == [0, 1, 2] and batch.term_counts == (3, 3)
    assert batch.caption_lengths[::2] == batch.caption_lengths[1::2]
    assert batch.pixels is not None
    torch.testing.assert_close(batch.pixels[3], samples[1].views[1])
    assert batch.targets[LABELS].tolist() == [sample.label for sample in samples[:3]]
    starts = torch.tensor(batch.caption_lengths).cumsum(0) - torch.tensor(batch.caption_lengths)
    length = batch.image_length
    assert batch.head_rows is not None
    assert batch.head_rows.tolist() == [*range(0, 6 * length, length), *(6 * length + starts).tolist()]
    assert pack([], None, {}, config.model).num_pairs == 0


def test_wrong_sources_are_refused(scenes: Path, tokenizer_files: dict[str, str], tmp_path: Path) -> None:
    tokenizer = TextTokenizer(tokenizer_files["text"])
    with pytest.raises(ConfigError, match="lacks 48 of 48 images"):
        build_stream(config_of(scenes, images=str(tmp_path)), tokenizer, "train")
    with pytest.raises(ConfigError, match="Remove them"):
        build_stream(config_of(scenes, split="train"), tokenizer, "train")
    unlabelled = tmp_path / "test.jsonl"
    unlabelled.write_text((scenes / "statements-train.jsonl").read_text().replace('"label"', '"other"'))
    with pytest.raises(ConfigError, match="has no label"):
        build_stream(config_of(scenes, path=str(unlabelled)), tokenizer, "train")
