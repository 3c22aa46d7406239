"""Tests that hostile files end in one printable line, within seconds and in bounded memory."""

import contextlib
import json
import resource
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from beit3_ds.checkpoint.folder import CheckpointFolder, is_checkpoint, open_checkpoint
from beit3_ds.cli.main import main
from beit3_ds.config import ConfigError
from tests.hostile.corpus import Figures, HostileKind, check_kind, show_figures
from tests.hostile.run_files import RunKinds
from tests.hostile.weight_files import weight_kinds
from tests.run_config import small_run_config
from tests.weights.hostile_files import Originals, write_hostile

SECONDS, MEGABYTES = 5.0, 300
HARMLESS = 0.25  # share of the changes that may leave a valid file, such as another layout in words


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    return Originals(tmp_path_factory.mktemp("originals"))


@pytest.fixture(scope="module")
def kinds(originals: Originals, tokenizer_files: dict[str, str]) -> dict[str, HostileKind]:
    return weight_kinds(originals, small_run_config(0)) | RunKinds(tokenizer_files).kinds


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def inspect(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Runs `beit3 inspect`; returns status and stderr, and checks the printed lines."""
    began = time.process_time()  # other programs may slow the clock's
    status = main(["inspect", str(path), "--tensors"])
    seconds = time.process_time() - began
    printed, errors = capsys.readouterr()
    assert seconds < SECONDS, f"{path} took {seconds:.1f} s"
    assert all(line.isprintable() for line in (printed + errors).split("\n"))
    return status, errors


def check_corpus(
    originals: Originals, folder: Path, numbers: Iterable[int], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("weights.safetensors", "released.pth", "timm.safetensors", "shards", "step-00000003"):
        assert inspect(originals.folder / name, capsys) == (0, "")
    start, valid, numbers = peak_megabytes(), 0, list(numbers)
    for number in numbers:
        place = folder / str(number)
        place.mkdir()
        path = write_hostile(originals, place, number)
        status, errors = inspect(path, capsys)
        if status == 0:
            valid += 1
            read_all(path)
        else:
            assert status == 2 and errors.startswith("error: ") and errors.count("\n") == 1, (number, errors[:2000])
            assert len(errors) < 10_000, number
        assert peak_megabytes() - start < MEGABYTES, f"file {number} took memory"
        shutil.rmtree(place)
    assert valid < HARMLESS * len(numbers)


def read_all(path: Path) -> None:
    """Reads all tensors of a checkpoint that can be opened."""
    if is_checkpoint(path):
        with contextlib.suppress(ConfigError):
            folder: CheckpointFolder = open_checkpoint(path)
            for name in folder.names():
                folder.read(name)


def test_a_sample_of_hostile_files(originals: Originals, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_corpus(originals, tmp_path, range(90), capsys)


@pytest.mark.slow
def test_thousands_of_hostile_files(originals: Originals, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_corpus(originals, tmp_path, range(90, 3600), capsys)


def test_a_sample_in_the_other_readers(kinds: dict[str, HostileKind], tmp_path: Path) -> None:
    for name, kind in kinds.items():
        check_kind(name, kind, tmp_path, range(6))


@pytest.mark.slow
def test_thousands_in_the_other_readers(kinds: dict[str, HostileKind], tmp_path: Path) -> None:
    found: dict[str, Figures] = {}
    for name, kind in kinds.items():
        found[name] = check_kind(name, kind, tmp_path, range(6, 200))
    print(show_figures(found))
    assert all(figures.refused > 0 for name, figures in found.items() if "recipe" not in name)  # a recipe is ignored


def test_commands_end_in_one_line(
    originals: Originals, run_mapping: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, image = tmp_path / "config.json", tmp_path / "a.png"
    config.write_text(json.dumps(run_mapping))
    Image.new("RGB", (40, 30)).save(image)
    tokenizer = run_mapping["beit3_ds"]["tokenizers"]["text"]["path"]
    commands = [
        ["export", "{path}", str(tmp_path / "out.safetensors")],
        ["import", "{path}", str(tmp_path / "out.safetensors")],
        ["predict", "match", "{path}", str(image), "--text", "a dog", "--tokenizer", tokenizer],
        ["evaluate", str(config), "--weights", "{path}"],
    ]
    for number in range(3 * len(commands)):
        place = tmp_path / str(number)
        place.mkdir()
        path = write_hostile(originals, place, number)
        command = [part.replace("{path}", str(path)) for part in commands[number % len(commands)]]
        status = main([*command, *(["--force"] if command[0] in ("export", "import") else [])])
        errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert (status == 0 and not errors) or (status in (1, 2) and len(errors) == 1), (command, status, errors)
        assert all(line.isprintable() for line in errors), command
