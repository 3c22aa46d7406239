"""Provides small shards, texts and a run configuration for the tests of data."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit3_ds.config import RunConfig, TextTokenizerConfig, build_run_config
from beit3_ds.tokenizers.text import TextTokenizer, train_text_tokenizer

_WORDS = ("red", "bird", "sits", "left", "of", "two", "green", "boats", "near", "water", "old", "trees", "in", "snow")

WriteTar = Callable[[Path, Mapping[str, bytes]], str]
BuildConfig = Callable[..., RunConfig]


def _sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(np.array(_WORDS), rng.integers(3, 12)))


def _write_tar(path: Path, members: Mapping[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def _random_png(rng: np.random.Generator) -> bytes:
    height, width = rng.integers(20, 60, 2)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def write_tar() -> WriteTar:
    """Provides a function that writes members to a tar file and returns the file's path."""
    return _write_tar


@pytest.fixture
def png() -> bytes:
    """Returns the bytes of a small valid image file."""
    return _random_png(np.random.default_rng(0))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Trains a text tokenizer of thirty pieces, including a full stop."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("tokenizer") / "text.spm"
    config = TextTokenizerConfig(path=str(path), vocab_size=30, character_coverage=1.0)
    return train_text_tokenizer(config, [f"{_sentence(rng)}." for _ in range(300)])


@pytest.fixture(scope="session")
def sample_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Writes files for the three streams: two shards of 22 images, two shards of 13 pairs, and a text."""
    folder, rng = tmp_path_factory.mktemp("samples"), np.random.default_rng(1)
    for shard, numbers in enumerate((range(9), range(9, 22))):
        _write_tar(folder / f"images-{shard}.tar", {f"image{i}.png": _random_png(rng) for i in numbers})
    for shard, numbers in enumerate((range(8), range(8, 13))):
        members: dict[str, bytes] = {}
        for i in numbers:
            members |= {f"pair{i}.png": _random_png(rng), f"pair{i}.txt": _sentence(rng).encode()}
        _write_tar(folder / f"pairs-{shard}.tar", members)
    (folder / "text.txt").write_text("\n\n".join(_sentence(rng) for _ in range(60)))
    shutil.copytree(folder, folder / "validation")
    return {name: str(folder / pattern) for name, pattern in _PATTERNS.items()}


_PATTERNS = {"images": "images-*.tar", "pairs": "pairs-*.tar", "texts": "text.txt"}


@pytest.fixture
def build_config(sample_files: dict[str, str]) -> BuildConfig:
    """Provides a function that builds the configuration of a tiny run.

    The run has a grid of 8 x 8 patches, a model view of 32 px and a tokenizer view of 64 px. Keyword arguments give the
    samples per step of each stream, `accumulation`, and more keys of the sections `data` and `training`. `files`
    replaces the sample files. Validation data are copies of the files.
    """

    def build(
        images: int = 4,
        pairs: int = 4,
        texts: int = 8,
        accumulation: int = 1,
        files: Mapping[str, str] | None = None,
        data: Mapping[str, object] | None = None,
        training: Mapping[str, object] | None = None,
    ) -> RunConfig:
        validation = {
            name: str(Path(path).parent / "validation" / Path(path).name) for name, path in sample_files.items()
        }
        validation, files = validation | dict(files or {}), sample_files | dict(files or {})
        sizes = {"images": images, "pairs": pairs, "texts": texts}
        streams = {
            name: {"train": [files[name]], "validation": [validation[name]], "samples_per_step": size}
            for name, size in sizes.items()
        }
        model = {"num_layers": 3, "hidden_size": 16, "ffn_hidden_size": 16, "num_attention_heads": 2}
        model |= {"image_size": 32, "patch_size": 4, "visual_vocab_size": 16, "text_vocab_size": 70}
        visual = {"path": "unused", "image_size": 64, "patch_size": 8, "codebook_size": 16}
        limits = {"text_length": 16, "pair_text_length": 12, "num_workers": 0}
        run = {"output_dir": "unused", "total_steps": 12, "warmup_steps": 0, "learning_rate": 0.1}
        section = {
            "model": model | {"drop_path_rate": 0.3},
            "data": streams | limits | dict(data or {}),
            "tokenizers": {"text": {"path": "unused", "vocab_size": 60}, "visual": visual},
            "training": run | dict(training or {}),
        }
        mapping = {"gradient_accumulation_steps": accumulation, "beit3_ds": section}
        return build_run_config(json.loads(json.dumps(mapping)))

    return build
