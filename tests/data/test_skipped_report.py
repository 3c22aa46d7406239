"""Tests the report at the start of a run on everything that its sources skip."""

from pathlib import Path

from beit3_ds.data.samples import name_sources
from beit3_ds.data.skipped_report import describe_skipped
from beit3_ds.tasks.pretraining.samples import build_train_streams
from beit3_ds.tokenizers.text import TextTokenizer
from tests.data.conftest import BuildConfig, WriteTar


def test_every_source_says_what_it_leaves_out(
    tmp_path: Path, build_config: BuildConfig, tokenizer: TextTokenizer, write_tar: WriteTar, png: bytes
) -> None:
    files = {
        "images": write_tar(tmp_path / "i.tar", {"a.png": png, "a.jpg": png, "b.heic": b""}),
        "pairs": write_tar(tmp_path / "p.tar", {"a.png": png, "a.txt": b"snow", "a.mask.png": png}),
        "texts": str(tmp_path / "*.txt"),
    }
    (tmp_path / "t.txt").write_bytes(b"snow\ncaf\xe9\n")
    (tmp_path / "u.txt").touch()
    config = build_config(files=files)
    lines = describe_skipped(name_sources("train", build_train_streams(config, tokenizer), config.data))
    # catches a source whose reasons are kept to itself
    assert [line.partition("]")[0] for line in lines] == [
        "data.images.train[0",
        "data.images.train[0",
        "data.pairs.train[0",
        "data.texts.train[0",
        "data.texts.train[0",
    ]
    for line, part in zip(lines, ("not read", "second image", "further part", "t.txt:2", "u.txt"), strict=True):
        assert "left out 1: " in line
        assert part in line
