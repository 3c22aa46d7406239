"""Tests the files that store which implementation was the fastest."""

import json
from pathlib import Path

import pytest

from beit3_ds.kernels.ops.choice_file import ChoiceFile, file_name

NAME = "gpu.json"


def test_a_choice_is_found_by_the_next_process(tmp_path: Path) -> None:
    ChoiceFile(NAME, tmp_path / "new" / "folder").add("linear 8", "library", {"library": 0.12345678, "triton": 1.0})
    assert ChoiceFile(NAME, tmp_path / "new" / "folder").find("linear 8") == "library"
    stored = json.loads((tmp_path / "new" / "folder" / NAME).read_text())
    assert stored == {"linear 8": {"fastest": "library", "milliseconds": {"library": 0.1235, "triton": 1.0}}}
    assert ChoiceFile("other.json", tmp_path / "new" / "folder").find("linear 8") is None


def test_two_processes_keep_what_both_measured(tmp_path: Path) -> None:
    """Catches a process that replaces the file with its own measurements only."""
    first, second = (ChoiceFile(NAME, tmp_path) for _ in range(2))
    first.add("a", "triton", {"triton": 1.0})
    second.add("b", "library", {"library": 1.0})
    assert [ChoiceFile(NAME, tmp_path).find(case) for case in "ab"] == ["triton", "library"]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_own_measurements_win_over_shipped_ones(tmp_path: Path) -> None:
    ChoiceFile(NAME, tmp_path / "shipped").add("a", "triton", {"triton": 1.0})
    ChoiceFile(NAME, tmp_path / "shipped").add("b", "triton", {"triton": 1.0})
    ChoiceFile(NAME, tmp_path / "own").add("a", "library", {"library": 1.0})
    both = ChoiceFile(NAME, tmp_path / "own", shipped=tmp_path / "shipped")
    assert [both.find(case) for case in "abc"] == ["library", "triton", None]


@pytest.mark.filterwarnings("ignore:.*is ignored, and operators are measured again")
@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, "\0", '{"a": 1, "b": {"fastest": 2}}'])
def test_an_invalid_file_costs_only_a_measurement(content: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(content)
    file = ChoiceFile(NAME, tmp_path)
    assert file.find("a") is None
    file.add("a", "triton", {"triton": 1.0})
    assert ChoiceFile(NAME, tmp_path).find("a") == "triton"


def test_a_folder_that_cannot_be_written_keeps_choices_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    file = ChoiceFile(NAME, tmp_path / "file" / "folder")
    with pytest.warns(UserWarning, match="kept in memory only"):
        file.add("a", "triton", {"triton": 1.0})
    file.add("b", "library", {"library": 1.0})  # without a second warning
    assert file.find("a") == "triton" and file.find("b") == "library"


def test_the_name_holds_device_and_versions() -> None:
    name = file_name("NVIDIA H200 / 141GB")
    assert name.startswith("nvidia_h200_141gb-torch") and name.endswith(".json") and "-triton" in name
    assert "/" not in name and " " not in name
