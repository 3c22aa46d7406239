"""Tests that a trainer's whole session ends, and that a log file that cannot be written stops nothing."""

import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from beit3_ds.cluster.launch.messages import Start
from beit3_ds.cluster.launch.trainer_process import TrainerProcess

LINES = [f"line {number}" for number in range(50)]
PRINT_LINES = f"import sys; print('\\n'.join({LINES!r})); print('progress 1\\rprogress 2')"


def run(code: str, log: Path, shown: list[str], troubles: list[str]) -> TrainerProcess:
    start = Start(command=[sys.executable, "-c", code], environment={}, folder="/", log=str(log), send_output=True)
    return TrainerProcess(start, shown.append, troubles.append)


def wait(trainer: TrainerProcess) -> int:
    assert select.select([trainer.pidfd], [], [], 60)[0], "it does not end"
    return trainer.finish()


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("log", ["log", "/dev/full", "no/such/folder/log"])
def test_output_survives_a_full_disk(tmp_path: Path, log: str) -> None:
    shown: list[str] = []
    troubles: list[str] = []
    trainer = run(f"{PRINT_LINES}; sys.exit(3)", tmp_path / log, shown, troubles)
    assert wait(trainer) == 3
    assert "".join(shown) == "\n".join([*LINES, "progress 1\rprogress 2", ""])
    assert trainer.last_lines() == [*LINES[-19:], "progress 2"]
    if log == "log":
        assert (tmp_path / log).read_bytes().decode() == "".join(shown) and not troubles
    else:
        (trouble,) = troubles
        assert trouble.endswith("No space left on device" if "full" in log else "No such file or directory")


def test_a_log_is_complete_once_its_folder_is_there(tmp_path: Path) -> None:
    """Catches log lines that are lost while the log's disk is full or not mounted."""
    code = f"import os, time; print('early', flush=True)\nwhile not os.path.exists({str(tmp_path / 'logs')!r}): "
    shown: list[str] = []
    troubles: list[str] = []
    trainer = run(code + "time.sleep(0.01)\nprint('late')", tmp_path / "logs" / "log", shown, troubles)
    wait_until(lambda: len(troubles) == 1)
    (tmp_path / "logs").mkdir()
    assert wait(trainer) == 0 and (tmp_path / "logs" / "log").read_text() == "early\nlate\n"


@pytest.mark.parametrize("is_stopped", [False, True])
def test_all_processes_of_a_session_are_killed(tmp_path: Path, is_stopped: bool) -> None:
    """Checks that processes forked by data loaders are killed too, also stopped ones."""
    code = "import os, time; os.fork(); os.write(1, b'%d\\n' % os.getpid()); time.sleep(1000)"  # in one write
    shown: list[str] = []
    trainer = run(code, tmp_path / "log", shown, [])
    wait_until(lambda: len("".join(shown).split()) == 2)
    pids = [int(word) for word in "".join(shown).split()]
    if is_stopped:
        trainer.send_signal(signal.SIGSTOP)
        wait_until(lambda: trainer.state() == "T")
    trainer.kill()
    assert wait(trainer) == -signal.SIGKILL
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def test_a_trainer_dies_with_its_guard(tmp_path: Path) -> None:
    """Catches a trainer that survives its guard, when no other process on its host can end it."""
    code = (
        "import sys, time; from beit3_ds.cluster.launch.messages import Start;"
        "from beit3_ds.cluster.launch.trainer_process import TrainerProcess;"
        f"start = Start(command=['sleep', '1000'], environment={{}}, folder='/', log={str(tmp_path / 'log')!r}, "
        "send_output=False); print(TrainerProcess(start, None, print).pid, flush=True); time.sleep(1000)"
    )
    guard = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert guard.stdout is not None
    pid = int(guard.stdout.readline())
    assert is_running(pid)
    guard.kill()
    guard.communicate()
    wait_until(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_what_a_trainer_leaves_behind_is_ended(tmp_path: Path) -> None:
    """Catches a left-behind process that keeps the pipe open and holds GPU memory."""
    code = "import os, time; pid = os.fork(); pid and os.write(1, b'%d\\n' % pid); time.sleep(0 if pid else 1000)"
    shown: list[str] = []
    trainer = run(code, tmp_path / "log", shown, [])
    before = time.monotonic()
    assert wait(trainer) == 0
    assert time.monotonic() - before < 30
    wait_until(lambda: not is_running(int("".join(shown))))


def test_a_signal_ends_a_trainer_that_still_starts(tmp_path: Path) -> None:
    """Catches a trainer that ignores signals while it imports torch, which takes minutes on a slow file system."""
    trainer = run("import time; time.sleep(60)", tmp_path / "log", [], [])
    trainer.send_signal(signal.SIGUSR1)
    assert wait(trainer) == -signal.SIGUSR1
