"""Tests that a finished tokenizer is neither retrained nor overwritten without `--force`."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.cli import main as cli
from beit3_ds.config import ConfigError, build_run_config
from beit3_ds.tasks.visual_tokenizer.config import VisualTokenizerSettings
from beit3_ds.tokenizers import VisualTokenizer, save_visual_tokenizer
from beit3_ds.tokenizers.recipe import Recipe, is_trained, save_with_recipe, visual_recipe
from tests.run_config import small_run_mapping, visual_tokenizer_mapping


@pytest.fixture
def mapping(tmp_path: Path) -> dict[str, Any]:
    mapping = small_run_mapping(0)
    (tmp_path / "words.txt").write_text("\n\n".join(["a red dog", "an old cat", "a bird that sings"] * 50))
    mapping["beit3_ds"]["data"]["texts"]["train"] = [str(tmp_path / "words.txt")]
    mapping["beit3_ds"]["data"]["pairs"] |= {"train": [], "validation": [], "samples_per_step": 0}
    mapping["beit3_ds"]["tokenizers"]["text"] |= {"path": str(tmp_path / "text.spm"), "vocab_size": 21}
    mapping["beit3_ds"]["tokenizers"]["visual"] |= {"path": str(tmp_path / "visual.safetensors")}
    return mapping


def run(mapping: dict[str, Any], folder: Path, command: str, *options: str) -> int:
    path = folder / "config.json"
    path.write_text(json.dumps(mapping))
    return cli.main([*command.split(), str(path), *options])


def test_finished_text_tokenizer_is_kept(
    mapping: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a second training; its ids may differ, and the checkpoints of runs would then be refused."""
    path = tmp_path / "text.spm"
    assert run(mapping, tmp_path, "train-text-tokenizer") == 0
    before = path.stat().st_mtime_ns
    capsys.readouterr()
    assert run(mapping, tmp_path, "train-text-tokenizer") == 0  # a job script that is submitted again continues
    assert "already trained with this recipe" in capsys.readouterr().out

    mapping["beit3_ds"]["tokenizers"]["text"]["vocab_size"] = 20
    assert run(mapping, tmp_path, "train-text-tokenizer") == 2
    error = capsys.readouterr().err
    assert "vocab_size from 21 to 20" in error and "--force" in error
    assert path.stat().st_mtime_ns == before
    (tmp_path / "text.spm.recipe.json").unlink()  # as after copying a tokenizer: the file itself gives the size
    assert run(mapping, tmp_path, "train-text-tokenizer") == 2
    assert "vocab_size from 21 to 20" in capsys.readouterr().err
    assert path.stat().st_mtime_ns == before

    assert run(mapping, tmp_path, "train-text-tokenizer", "--force") == 0
    assert path.stat().st_mtime_ns != before
    assert run(mapping, tmp_path, "train-text-tokenizer") == 0


@pytest.mark.parametrize("failing", [1, 2])  # the write of the probe comes before
def test_a_full_disk_keeps_the_old_tokenizer_with_its_recipe(
    failing: int,
    mapping: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a new tokenizer with the recipe of the old one, and leftover files."""
    assert run(mapping, tmp_path, "train-text-tokenizer") == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("text*")}
    assert len(before) == 2
    mapping["beit3_ds"]["tokenizers"]["text"]["vocab_size"] = 20
    calls: list[int] = []

    def sync(file: int) -> None:
        calls.append(file)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", sync)
    assert run(mapping, tmp_path, "train-text-tokenizer", "--force") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: tokenizers.text.path=") and "No space left on device (no file was replaced)" in line
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*text*")} == before
    assert run(mapping, tmp_path, "train-text-tokenizer", "--force") == 0


def test_two_trainings_of_one_text_tokenizer_exclude_each_other(
    mapping: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "tests.lock_holder", str(tmp_path / "text.spm.lock"), ""]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert run(mapping, tmp_path, "train-text-tokenizer") == 2
    assert f"text.spm is in use by process {holder.pid} on host " in capsys.readouterr().err
    assert not (tmp_path / "text.spm").exists()


def test_copied_visual_tokenizer_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a second training, which would take minutes and write a different file."""
    mapping = visual_tokenizer_mapping(tmp_path)
    visual = build_run_config(mapping).tokenizers.visual
    path = Path(visual.path)
    save_visual_tokenizer(path, VisualTokenizer(visual, teacher_width=8))
    before = path.read_bytes()
    assert run(mapping, tmp_path, "train") == 0  # its file names sizes, and no recipe contradicts
    assert "already trained" in capsys.readouterr().out
    mapping["beit3_ds"]["tokenizers"]["visual"]["codebook_size"] = 8
    assert run(mapping, tmp_path, "train") == 2
    assert "codebook_size from 16 to 8" in capsys.readouterr().err
    path.write_bytes(b"no tokenizer")
    assert run(mapping, tmp_path, "train") == 2
    assert "is not a visual tokenizer of this project" in capsys.readouterr().err
    assert path.read_bytes() == b"no tokenizer" != before


def visual_tokenizer_recipe(mapping: dict[str, Any]) -> Recipe:
    config = build_run_config(mapping)
    return visual_recipe(config, dataclasses.asdict(config.task.load(VisualTokenizerSettings)))


def test_first_versions_form_of_a_recipe_is_known(tmp_path: Path) -> None:
    """Catches an upgrade that refuses a finished tokenizer although the recipe is equal."""
    mapping = visual_tokenizer_mapping(tmp_path)
    mapping["beit3_ds"]["data"]["images"] |= {"train": ["photos.tar", "pairs.tar"]}
    recipe, path = visual_tokenizer_recipe(mapping), tmp_path / "visual.safetensors"
    # As that version wrote it: with every key of a source, set or not, in two streams whose weights had no meaning.
    named = {name: {"path": name, "format": None, "images": "", "weight": None} for name in ("photos.tar", "pairs.tar")}
    named["photos.tar"]["weight"] = 2.0
    of_pairs = [named["photos.tar"], named["pairs.tar"]]
    save_with_recipe(path, b"", recipe | {"images.train": [named["photos.tar"]], "pairs.train": of_pairs})
    assert is_trained("tokenizers.visual", path, recipe, dict)
    with pytest.raises(ConfigError, match=r"images\.train from"):
        is_trained("tokenizers.visual", path, recipe | {"images.train": [{"path": "other.tar"}]}, dict)
    with pytest.raises(ConfigError, match="batch_size from 8 to 9"):
        is_trained("tokenizers.visual", path, recipe | {"batch_size": 9}, dict)


@pytest.mark.parametrize("name", ["file/tokenizer", "folder", "/proc/no/tokenizer"])
@pytest.mark.parametrize("kind", ["text", "visual"])
@pytest.mark.parametrize("options", [[], ["--force"]])
def test_a_tokenizer_that_could_not_be_saved_is_not_trained(
    mapping: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    name: str,
    options: list[str],
) -> None:
    """Catches a training that fails with a traceback after hours."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    if kind == "visual":
        mapping = visual_tokenizer_mapping(tmp_path, steps=10**6)
    mapping["beit3_ds"]["tokenizers"][kind]["path"] = path = str(tmp_path / name)
    assert run(mapping, tmp_path, "train-text-tokenizer" if kind == "text" else "train", *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"tokenizers.{kind}.path={path} cannot be written: " in error
    assert not list(tmp_path.glob("**/*.tmp"))


def test_other_files_that_cannot_be_written_are_one_line(
    mapping: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback if a folder is read-only or full."""
    assert run(mapping, tmp_path, "train-text-tokenizer") == 0
    capsys.readouterr()
    (tmp_path / "file").touch()
    mapping["beit3_ds"]["data"]["cache_dir"] = str(tmp_path / "file/prepared")
    assert run(mapping, tmp_path, "prepare texts") == 1
    error = capsys.readouterr().err.strip()
    assert "Not a directory" in error and "\n" not in error
