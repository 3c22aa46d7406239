"""Tests the text benchmark: its corpus, its files, and memory use that does not grow with the corpus."""

import json
from pathlib import Path

import pytest

from beit3_ds.benchmarks.data.text import benchmark_text, write_corpus
from beit3_ds.cli.main import main


def test_the_corpus_is_shuffled_sentences_of_the_size_asked_for(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a.txt", 100_000)
    text = (tmp_path / "a.txt").read_text()
    assert len(text.encode()) == 100_000
    lines = text.split("\n")
    assert len(lines) > 50
    assert len(set(lines)) == len(lines)  # catches one block that is repeated


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    benchmark_text(600_000_000, processes=2, json_path=str(tmp_path / "out.json"))
    summary = json.loads((tmp_path / "out.json").read_text())["summary"]
    assert summary["memory_early_bytes"] > 50_000_000  # catches a sampler that saw nothing
    assert summary["memory_growth"] < 1.1
    assert summary["open_seconds"] < 5


@pytest.mark.slow
def test_the_command_writes_rows_and_summary(tmp_path: Path) -> None:
    assert main(["bench", "text", "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["rows"]) == 7
    assert result["summary"]["ratio_low"] <= result["summary"]["ratio_sentencepiece"] <= result["summary"]["ratio_high"]
