"""Tests that files are whole or absent, and have the permissions of the umask."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from beit3_ds.atomic_file import atomic_write
from beit3_ds.config import build_run_config
from tests.run_config import small_run_mapping


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_tokenizers_have_the_permissions_of_the_umask(umask: int, tmp_path: Path) -> None:
    """Catches tokenizers that only their owner can read, as safetensors writes them."""
    from beit3_ds.tokenizers import VisualTokenizer, load_visual_tokenizer, save_visual_tokenizer, train_text_tokenizer

    mapping = small_run_mapping(0)
    mapping["beit3_ds"]["tokenizers"]["text"] |= {"path": str(tmp_path / "text.spm"), "vocab_size": 16}
    mapping["beit3_ds"]["tokenizers"]["visual"]["path"] = str(tmp_path / "visual.safetensors")
    config = build_run_config(mapping)
    tokenizer = VisualTokenizer(config.tokenizers.visual, teacher_width=8)
    save_visual_tokenizer(config.tokenizers.visual.path, tokenizer)
    load_visual_tokenizer(config.tokenizers.visual.path)
    train_text_tokenizer(config.tokenizers.text, ["a red dog", "an old cat"] * 50)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("text.spm", "visual.safetensors"), 0o666 & ~umask)


def fail_halfway(path: Path) -> None:
    with atomic_write(path) as file:
        file.write(b"half of the ne")
        raise OSError(28, os.strerror(28))


def test_error_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        fail_halfway(path)
    assert [path.read_bytes(), *tmp_path.iterdir()] == [b"old", path]


def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.spm"
    path.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    refused = pytest.raises(OSError, match=r"No space left on device \(no file was replaced\): '.*text\.spm'")
    with refused, atomic_write(path) as file:
        file.write(b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
