"""The tokenizers' corpora: all of the training files, broken records left out."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from beit3_ds.config import ConfigError
from beit3_ds.data.tokenizer_corpora import TokenizerImages, build_view_loader, read_training_lines
from beit3_ds.data.workers.waiting import WaitLimits
from tests.data.conftest import BuildConfig, WriteTar


def test_lines_are_texts_then_captions(
    build_config: BuildConfig, tmp_path: Path, write_tar: WriteTar, png: bytes
) -> None:
    (tmp_path / "text.txt").write_text("one\n\ntwo \n")
    pairs = write_tar(tmp_path / "pairs.tar", {"a.png": png, "a.txt": b"three", "b.png": png, "c.txt": b"four"})
    config = build_config(files={"texts": str(tmp_path / "text.txt"), "pairs": pairs})
    with pytest.warns(UserWarning, match=r"pairs\.tar:b: no caption"):
        assert list(read_training_lines(config.data)) == ["one", "two", "three", "four"]


def test_views_are_the_tokenizers_and_never_the_same(build_config: BuildConfig) -> None:
    images = TokenizerImages(build_config(data={"min_crop_scale": 0.2}))
    views = [images[i] for i in range(70)]  # 35 images: 22 and the 13 of pairs, twice
    assert all(view.shape == (3, 64, 64) and view.dtype == torch.float32 for view in views)
    assert torch.equal(images[35], views[35])
    for i in range(70):
        assert not any(torch.equal(views[i], views[j]) for j in range(i)), i  # catches one crop for all epochs


def test_every_epoch_shows_each_image_once_in_an_order_of_its_own(
    build_config: BuildConfig, tmp_path: Path, write_tar: WriteTar
) -> None:
    shades = {f"{shade}.png": flat_png(shade) for shade in range(0, 250, 10)}
    shard = write_tar(tmp_path / "shades.tar", shades)
    config = build_config(files={"images": shard, "pairs": shard}, data={"color_jitter": 0})
    images = TokenizerImages(config)
    shown = [round(float((images[i].mean() + 1) * 127.5)) for i in range(50)]
    assert sorted(shown[:25]) == sorted(shown[25:]) == list(range(0, 250, 10))
    assert shown[:25] != shown[25:]


def flat_png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (shade, shade, shade)).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_come_in_order(build_config: BuildConfig, num_workers: int) -> None:
    images = TokenizerImages(build_config())
    batches = (range(start, start + 2) for start in (4, 0, 8))
    loaded = list(build_view_loader(images, batches, num_workers, WaitLimits(seconds=60)))
    assert [len(batch.pixels) for batch in loaded] == [2, 2, 2]
    for start, batch in zip((4, 0, 8), loaded, strict=True):
        assert torch.equal(batch.pixels, torch.stack([images[start], images[start + 1]]))


def test_broken_images_are_replaced(build_config: BuildConfig, tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    shard = write_tar(tmp_path / "s.tar", {"bad.png": b"no image", "good.png": png})
    images = TokenizerImages(build_config(files={"images": shard, "pairs": shard}))  # one shard for both: counted once
    (batch,) = build_view_loader(images, [range(4)], 0, WaitLimits(seconds=60))  # two epochs: the record is met twice
    assert batch.pixels.shape == (4, 3, 64, 64)
    ((name, line),) = batch.broken_records.items()  # catches a count of encounters
    assert name.endswith("s.tar:bad") and line.startswith(f"{name}: ")
    broken = write_tar(tmp_path / "broken.tar", {"bad.png": b"no image"})
    with pytest.raises(ConfigError, match="none of the 1 training images"):  # catches a search without an end
        TokenizerImages(build_config(files={"images": broken, "pairs": broken}))[0]
