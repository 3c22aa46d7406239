"""Tests that the checkpoint benchmark chooses a model size that fits, and does not invert its ratios."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from beit3_ds.benchmarks.checkpoint import benchmark as bench
from beit3_ds.benchmarks.checkpoint import size as choice
from beit3_ds.config import ConfigError


@pytest.mark.slow
def test_figures_are_written_and_nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_SAVES", "_LOADS", "_EXPORTS"):
        monkeypatch.setattr(bench, name, 2 if name == "_LOADS" else 1)
    scratch, out = tmp_path / "scratch", tmp_path / "checkpoint.json"
    table = bench.benchmark_checkpoint("tiny", 1, str(scratch), str(out))
    assert not list(scratch.iterdir())
    result = json.loads(out.read_text())
    assert {(row["operation"], row["by"]) for row in result["rows"]} == {
        (operation, by) for operation in ("save", "load", "export") for by in ("beit3_ds", "deepspeed")
    }
    summary = result["summary"]
    assert {"export_memory_ratio", "export_time_ratio", "stall_share", "load_peak_share"} <= set(summary)
    figures = {name: value for name, value in summary.items() if name not in ("size", "load_average")}
    assert all(0 < value < math.inf for value in figures.values()), figures
    state = 36e6 * 12  # bytes of weights and moments
    assert summary["states_gb"] == pytest.approx(36e6 * 14 / 1e9, rel=0.02)
    # The rest, 0.3 GB, is the engine's bucket and pages of libraries. Catches memory that DeepSpeed's load left.
    assert 1 < summary["load_peak_share_without_libraries"] < 2 < summary["load_peak_share"]
    for row in result["rows"]:
        assert row["peak_bytes"] > (36e6 * 4 if row["operation"] == "export" else state)  # catches kB taken for bytes
    assert summary["export_memory_ratio"] > 1  # catches a ratio upside down
    assert "| export | zero_to_fp32 |" in table


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the measurements by 0.5 GB per rank and 28 bytes per parameter; returns the sizes measured so far."""
    sizes: list[str] = []

    def measure(size: str, ranks: int, folder: Path) -> tuple[int, int]:
        sizes.append(size)
        return ranks * 500_000_000, ranks * 500_000_000 + 28 * choice.count_parameters(size)

    monkeypatch.setattr(choice, "_measure_peak", measure)
    monkeypatch.setattr(choice.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100 << 30))
    return sizes


def test_the_largest_size_that_fits_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str]
) -> None:
    """Checks the choice on a disk and memory where size "large" just fits.

    Size "large" needs 20.3 GiB: 18.8 GB for the parameters, 1 GB for two processes and 2 GB left free.
    """
    monkeypatch.setattr(choice, "_available_bytes", lambda: 21 << 30)
    chosen = choice.choose_size(None, 2, tmp_path)
    assert chosen.size == "large" and "giant needs 53." in chosen.reason
    assert measured == ["tiny", "base"]
    monkeypatch.setattr(choice, "_available_bytes", lambda: 20 << 30)
    assert choice.choose_size(None, 2, tmp_path).size == "base"
    with pytest.raises(ConfigError, match=r"large needs 20\.3 GiB and 27 GiB\. Name a smaller --size"):
        choice.choose_size("large", 2, tmp_path)
    monkeypatch.setattr(choice, "_available_bytes", lambda: 5 << 30)
    assert choice.choose_size(None, 2, tmp_path).size == "tiny"  # base is not measured, because it would not fit


def test_no_size_is_measured_where_none_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str]
) -> None:
    monkeypatch.setattr(choice, "_available_bytes", lambda: 4 << 30)
    with pytest.raises(ConfigError, match=r"tiny needs 4\.7 GiB"):
        choice.choose_size(None, 2, tmp_path)
    assert not measured


def test_memory_is_predicted_by_the_last_two_peaks() -> None:
    """Catches a prediction that scales the memory of libraries with the size of the model."""
    assert choice.predict_bytes([choice.Peak(0, 5), choice.Peak(10, 105)], 30) == 305
    assert choice.predict_bytes([choice.Peak(0, 5), choice.Peak(10, 105), choice.Peak(20, 185)], 40) == 345


def test_an_unknown_size_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'huge' is not one of"):
        choice.choose_size("huge", 2, tmp_path)
