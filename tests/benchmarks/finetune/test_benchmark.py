"""Tests that the fine-tuning benchmark runs, and that its ratios are not inverted."""

import json
from pathlib import Path

import pytest

from beit3_ds.benchmarks.finetune import benchmark as bench
from beit3_ds.cli import main as cli


def test_ratios_are_the_right_way_up() -> None:
    step = {"beit3_ds": {"seconds": 10.0, "peak_bytes": 6}, "torchscale": {"seconds": 15.0, "peak_bytes": 8}}
    decoding = {**step, "blip": {"seconds": 5.0, "peak_bytes": 1}}
    summary = bench._summarize({"vqa": [step], "decoding": [decoding]})
    expected = {"ratio_vqa": 1.5, "ratio_decoding": 1.5, "ratio_blip": 0.5, "memory_ratio": 0.75}
    assert {name: summary[name] for name in expected} == pytest.approx(expected)


@pytest.mark.slow  # five processes
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "DECODED_IMAGES", 2)
    monkeypatch.setattr(bench, "has_blip", lambda: False)
    out = tmp_path / "finetune.json"
    arguments = ["bench", "finetune", "--size", "tiny", "--samples", "2", "--rounds", "1", "--image-size", "32"]
    assert cli.main([*arguments, "--tasks", "retrieval", "decoding", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {"ratio_retrieval", "ratio_decoding", "memory_ratio"} <= set(result["summary"])
    (row,) = result["rows"]["retrieval"]
    assert row["beit3_ds"]["tokens"] == row["torchscale"]["tokens"]
    assert row["beit3_ds"]["loss"] == pytest.approx(row["torchscale"]["loss"], abs=1.5)
    printed = capsys.readouterr()
    assert "| decoding | torchscale |" in printed.out and "ratio_blip unavailable" in printed.out
    assert "retrieval: round 1 of 1" in printed.err


def test_wrong_arguments_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "finetune", "--size", "huge"]) == 2
    assert "'huge' is not one of" in capsys.readouterr().err
    assert cli.main(["bench", "finetune", "--json", str(tmp_path / "absent" / "x.json")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
