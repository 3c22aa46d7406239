"""Tests that a resumed run deletes only its own records of repeated steps from metrics.jsonl."""

from pathlib import Path

import pytest

from beit3_ds.training.metrics_log import MetricsLog


def test_only_repeated_records_are_dropped(tmp_path: Path) -> None:
    metrics_log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        metrics_log.append({"step": step, "kind": "train"})
    with open(metrics_log.path, "a") as file:
        file.write('# a note\n{"comment": "lower rate from here"}\n[1]\n\n')
    metrics_log.forget_after(2)
    assert [record["step"] for record in metrics_log.records()] == [1, 2]
    assert metrics_log.path.read_text().splitlines()[2:] == [
        "# a note",
        '{"comment": "lower rate from here"}',
        "[1]",
        "",
    ]
    metrics_log.append({"step": 3})
    assert metrics_log.records()[-1] == {"step": 3}


def test_a_line_that_was_cut_takes_no_other_with_it(tmp_path: Path) -> None:
    """Catches a record that is appended to a truncated line, which would lose both."""
    metrics_log = MetricsLog(tmp_path / "metrics.jsonl")
    metrics_log.append({"step": 1})
    with open(metrics_log.path, "a") as file:
        file.write('{"step": 2, "lo')
    metrics_log.append({"step": 2})
    assert metrics_log.records() == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("runs", [1, 3])
def test_records_of_an_earlier_run_are_kept(tmp_path: Path, runs: int) -> None:
    """Catches lost records of an earlier run when a run without a checkpoint starts in the same folder."""
    metrics_log = MetricsLog(tmp_path / "metrics.jsonl")
    assert metrics_log.move_aside() is None
    for number in range(1, runs + 1):
        metrics_log.append({"step": number})
        assert metrics_log.move_aside() == tmp_path / f"metrics-{number}.jsonl"
    assert MetricsLog(tmp_path / f"metrics-{runs}.jsonl").records() == [{"step": runs}]
    assert metrics_log.records() == []


def test_a_linked_file_stays_linked(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    metrics_log = MetricsLog(tmp_path / "metrics.jsonl")
    metrics_log.path.symlink_to("elsewhere.jsonl")
    metrics_log.forget_after(1)
    assert metrics_log.path.is_symlink() and (tmp_path / "elsewhere.jsonl").read_text() == '{"step": 1}\n'
