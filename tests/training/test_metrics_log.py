"""What is in metrics.jsonl: a run's own records are dropped where it repeats steps, nothing else is."""

from pathlib import Path

import pytest

from beit3_ds.training.metrics_log import History


def test_only_repeated_records_are_dropped(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        history.append({"step": step, "kind": "train"})
    with open(history.path, "a") as file:
        file.write('# a note\n{"comment": "lower rate from here"}\n[1]\n\n')
    history.forget_after(2)
    assert [record["step"] for record in history.records()] == [1, 2]
    assert history.path.read_text().splitlines()[2:] == ["# a note", '{"comment": "lower rate from here"}', "[1]", ""]
    history.append({"step": 3})
    assert history.records()[-1] == {"step": 3}


def test_a_line_that_was_cut_takes_no_other_with_it(tmp_path: Path) -> None:
    """Catches a record that is appended to the rest of one, so that both are lost."""
    history = History(tmp_path / "metrics.jsonl")
    history.append({"step": 1})
    with open(history.path, "a") as file:
        file.write('{"step": 2, "lo')
    history.append({"step": 2})
    assert history.records() == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("runs", [1, 3])
def test_records_of_an_earlier_run_are_kept(tmp_path: Path, runs: int) -> None:
    """A run without a checkpoint begins anew: its folder may hold what another one recorded."""
    history = History(tmp_path / "metrics.jsonl")
    assert history.move_aside() is None
    for number in range(1, runs + 1):
        history.append({"step": number})
        assert history.move_aside() == tmp_path / f"metrics-{number}.jsonl"
    assert History(tmp_path / f"metrics-{runs}.jsonl").records() == [{"step": runs}]
    assert history.records() == []


def test_a_linked_file_stays_linked(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    history = History(tmp_path / "metrics.jsonl")
    history.path.symlink_to("elsewhere.jsonl")
    history.forget_after(1)
    assert history.path.is_symlink() and (tmp_path / "elsewhere.jsonl").read_text() == '{"step": 1}\n'
