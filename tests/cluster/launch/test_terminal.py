"""Tests the supervisor's printed lines, and the last lines of logs."""

from pathlib import Path

import pytest

from beit3_ds.cluster.launch.terminal import Terminal, last_lines


def test_lines_go_to_stderr_and_the_file_and_output_to_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(tmp_path / "launch.log")
    terminal.report("started", ["one", "two"])
    terminal.print_output("step 1\n")
    printed = capsys.readouterr()
    assert printed.err == "beit3 launch: started\n    | one\n    | two\n" and printed.out == "step 1\n"
    (first, *quoted) = (tmp_path / "launch.log").read_text().splitlines()
    assert first.endswith(" started") and quoted == ["    | one", "    | two"]


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches lines that stay lost after the disk has room again."""
    terminal = Terminal(log := tmp_path / "none" / "launch.log")
    terminal.report("started")
    reason = f"beit3 launch: {log} cannot be written: No such file or directory\n"
    assert capsys.readouterr().err == f"beit3 launch: started\n{reason}"
    log.parent.mkdir()
    terminal.report("finished")
    assert [line.split()[-1] for line in log.read_text().splitlines()] == ["started", "finished"]
    assert capsys.readouterr().err == "beit3 launch: finished\n"


def test_last_lines_of_a_log(tmp_path: Path) -> None:
    (log := tmp_path / "rank_0.log").write_bytes(b"\xff\n" + b"".join(b"line %d\n" % i for i in range(1000)))
    assert last_lines(log, 2) == ["line 998", "line 999"] and len(last_lines(log)) == 20
    assert last_lines(tmp_path / "none") == []
