"""Tests that `beit3 prepare texts` resumes, and checks its output."""

import json
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.cli.main import main


def test_prepares_and_resumes(run_mapping: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.json"
    run_mapping["beit3_ds"]["data"]["cache_dir"] = str(tmp_path / "prepared")
    config.write_text(json.dumps(run_mapping))
    stats = ["prepare", "stats", str(config), "--samples", "2"]
    assert main(stats) == 0
    assert capsys.readouterr().out.count("not prepared yet") == 2  # training and validation texts
    assert main(["prepare", "texts", str(config), "--part", "1/2", "--processes", "1"]) == 0
    assert "1 files wait for pieces of other shares" in capsys.readouterr().out
    assert main(["prepare", "texts", str(config), "--processes", "1"]) == 0
    output = capsys.readouterr().out
    assert "in 2 pieces (1 were there), 0 broken lines" in output
    assert "wait" not in output
    total = int(output.split(" tokens")[0].replace(",", ""))
    assert main(stats) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(int(line.split()[0].replace(",", "")) for line in lines if "tokens prepared" in line) == total
    assert main(["prepare", "texts", str(config), "--part", "3/2"]) == 2
    assert "error: --part 3/2" in capsys.readouterr().err
