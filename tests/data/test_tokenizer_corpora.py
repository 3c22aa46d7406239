"""The tokenizers' corpora: all of the training files, broken records left out."""

from pathlib import Path

import pytest
import torch

from beit3_ds.config import ConfigError
from beit3_ds.data.tokenizer_corpora import TokenizerImages, read_training_lines
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
    images = TokenizerImages(build_config())
    views = [images[i] for i in (0, 1, 35, 70)]  # 35 images: 22 and the 13 of pairs
    assert all(view.shape == (3, 64, 64) and view.dtype == torch.float32 for view in views)
    assert torch.equal(images[35], views[2])
    # catches one crop for all epochs
    assert not torch.equal(views[0], views[2])
    assert not torch.equal(views[2], views[3])


def test_broken_images_are_replaced(build_config: BuildConfig, tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    shard = write_tar(tmp_path / "s.tar", {"bad.png": b"no image", "good.png": png})
    images = TokenizerImages(build_config(files={"images": shard, "pairs": shard}))  # one shard for both: counted once
    with pytest.warns(UserWarning, match=r"s\.tar:bad"):
        assert images[0].shape == (3, 64, 64)
    broken = write_tar(tmp_path / "broken.tar", {"bad.png": b"no image"})
    with (
        pytest.raises(ConfigError, match="none of the 1 training images"),  # catches a search without an end
        pytest.warns(UserWarning, match="bad"),
    ):
        TokenizerImages(build_config(files={"images": broken, "pairs": broken}))[0]
