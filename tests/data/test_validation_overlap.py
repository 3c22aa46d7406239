"""Tests that validation files among the training files are refused, for all kinds of patterns."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from beit3_ds.cli import main as cli
from beit3_ds.config import ConfigError, DataConfig, SourceConfig, StreamConfig
from beit3_ds.data.validation_overlap import check_validation_apart
from tests.run_config import quickstart_mapping

Files = Mapping[str, tuple[Sequence[str], Sequence[str]]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Writes files of all kinds, and links to some of them."""
    for name in ("a.tar", "b.tar", "c.tar", "a.txt", "b.txt", "c.json", "d.json", "images/x/1.png", "other/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"the same bytes everywhere")
    (tmp_path / "link.tar").symlink_to("a.tar")
    os.link(tmp_path / "a.txt", tmp_path / "hard.txt")
    (tmp_path / "linked").symlink_to("images")
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes/x").symlink_to("../images/x")
    (tmp_path / "classes/other").symlink_to("../other")
    return tmp_path


def _config(folder: Path, samples_per_step: int = 1, **files: tuple[Sequence[str], Sequence[str]]) -> DataConfig:
    def source(name: str) -> SourceConfig:
        if name.endswith(".json"):
            return SourceConfig(path=str(folder / name), format="coco", images=str(folder))
        return SourceConfig(path=str(folder / name))

    streams = {
        stream: StreamConfig(
            train=tuple(map(source, train)),
            validation=tuple(map(source, validation)),
            samples_per_step=samples_per_step,
        )
        for stream, (train, validation) in files.items()
    }
    none = StreamConfig(train=(), samples_per_step=0)
    return DataConfig(**{name: streams.get(name, none) for name in ("images", "pairs", "texts")})


@pytest.mark.parametrize(
    "files",
    [
        {"images": (["a.tar"], ["a.tar"])},
        {"images": (["[ab].tar"], ["link.tar"])},  # catches names that are compared
        {"images": (["{a,b}.tar"], ["[bc].tar"])},
        {"pairs": (["a.tar"], ["b.tar"]), "images": (["b.tar"], [])},
        {"texts": (["a.txt"], ["hard.txt"])},
        {"texts": (["*.txt"], ["b.txt"])},
        {"images": (["images"], ["linked"])},
        {"images": (["images"], ["images/x"])},
        {"images": (["images/x"], ["linked"])},
        {"images": (["classes"], ["images"])},  # catches classes that are linked together for training
        {"images": (["other"], ["classes"])},
        {"pairs": (["c.json"], ["c.json"])},
    ],
)
def test_shared_files_are_refused(folder: Path, files: Files) -> None:
    with pytest.raises(
        ConfigError,
        match=r"training source .* validation source .*(are the same|contain one another|share .* through links)",
    ):
        check_validation_apart(_config(folder, **files))


@pytest.mark.parametrize(
    "files",
    [
        {"images": (["a.tar"], ["b.tar"]), "texts": (["a.txt"], ["b.txt"])},
        {"images": (["a.tar"], ["b.tar"]), "pairs": (["a.tar"], ["b.tar"])},  # streams may share sources
        {"images": (["images"], ["other"])},
        {"pairs": (["c.json"], ["d.json"])},  # two lists of captions of one folder
        {"images": (["a.tar"], [])},
    ],
)
def test_other_files_are_accepted(folder: Path, files: Files) -> None:
    check_validation_apart(_config(folder, **files))


def test_a_stream_that_is_left_out_trains_on_nothing(folder: Path) -> None:
    check_validation_apart(_config(folder, samples_per_step=0, images=(["a.tar"], ["a.tar"])))


def test_files_that_are_not_there_are_no_overlap(folder: Path) -> None:
    config = _config(folder, images=(["gone-*.tar"], ["gone-*.tar"]), texts=(["a.txt"], ["hard.txt"]))
    with pytest.raises(ConfigError, match="no file matches"):
        check_validation_apart(config)
    with pytest.raises(ConfigError, match="are the same"):
        check_validation_apart(config, must_exist=False)
    check_validation_apart(_config(folder, images=(["gone.tar"], ["gone.tar"])), must_exist=False)


def test_check_refuses_a_shared_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = quickstart_mapping()
    content["beit3_ds"]["data"]["texts"] |= {"train": [str(folder / "a.txt")], "validation": [str(folder / "hard.txt")]}
    (folder / "run.json").write_text(json.dumps(content))
    assert cli.main(["check", str(folder / "run.json")]) == 2
    assert "are the same" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sources", [["a.txt", "a.txt"], ["a.txt", "hard.txt"], ["*.txt", "b.txt"], ["a.txt", "b.txt", "gone.txt", "b.txt"]]
)
def test_check_refuses_a_file_of_two_sources(
    folder: Path, sources: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a file in two sources that `beit3 check` accepts and a run refuses."""
    content = quickstart_mapping()
    content["beit3_ds"]["data"]["texts"] |= {"train": [str(folder / name) for name in sources], "validation": []}
    (folder / "run.json").write_text(json.dumps(content))
    assert cli.main(["check", str(folder / "run.json")]) == 2
    error = capsys.readouterr().err
    assert ("is listed twice" in error or "are the same file" in error) and error.count("\n") == 1
