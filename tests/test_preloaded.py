"""Tests that forked processes start alike, end like `python -m`, and do not affect later processes."""

import os
import random
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.preloaded import ROOT, start_module
from tests.ranks import run_ranks

PROGRAM = """
import sys
words = __name__, sys.argv[1:], sys.modules["__main__"].__doc__, __file__ == sys.argv[0]
print(words, flush=True)
print("to stderr", file=sys.stderr)
"""
ENDS = {
    "": 0,
    "raise SystemExit": 0,
    "raise SystemExit(3)": 3,
    "raise SystemExit('words')": 1,
    "raise ValueError('words')": 1,
    "import os; os.abort()": -signal.SIGABRT,
    "import atexit; atexit.register(print, 'words')": 0,
    "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('words'))).start()": 0,
}


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the path of a module `program`, which the test writes into the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "program.py"


def both(program: Path, text: str) -> list[tuple[int, str]]:
    """Runs a module in a new Python process and in a forked one; returns status and output of each."""
    program.write_text(text)
    started = subprocess.run(
        [sys.executable, "-m", "program", "one", "two"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    forked = start_module("program", ["one", "two"], output=subprocess.PIPE)
    output, _ = forked.communicate(timeout=30)
    assert forked.returncode is not None
    return [(started.returncode, started.stdout), (forked.returncode, output)]


def test_a_forked_module_is_the_main_one(program: Path) -> None:
    started, forked = both(program, f'"""Words."""{PROGRAM}')
    assert forked == started == (0, "('__main__', ['one', 'two'], 'Words.', True)\nto stderr\n")


@pytest.mark.parametrize("end", ENDS)
def test_it_ends_as_python_does(program: Path, end: str) -> None:
    """Catches exit handlers that do not run, threads that are not awaited, and a lost status or message."""
    started, forked = both(program, end)
    assert started[0] == forked[0] == ENDS[end]
    assert [line for line in started[1].splitlines() if "words" in line and "File" not in line] == [
        line for line in forked[1].splitlines() if "words" in line and "File" not in line
    ]


def test_signals_timeouts_and_files(program: Path) -> None:
    program.write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)")
    process = start_module("program", [], output=subprocess.PIPE)
    assert process.poll() is None and process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == process.poll() == -signal.SIGTERM
    process.kill()  # it has ended: nobody is signalled

    with Path("log").open("w") as log:
        process = start_module("program", [], output=log)
    while not Path("log").read_text():
        assert process.poll() is None
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    assert Path("log").read_text() == "begun\n"

    process = start_module("program", [], output=subprocess.PIPE)
    assert process.communicate(timeout=2) == ("begun\n", None)
    assert process.returncode == -signal.SIGKILL


def test_the_environment_is_the_given_one(program: Path) -> None:
    program.write_text("import os\nprint(dict(os.environ), os.getcwd())")
    process = start_module("program", [], env={"ONLY": "this"}, output=subprocess.PIPE)
    assert process.communicate(timeout=30)[0] == f"{ {'ONLY': 'this'} } {program.parent}\n"


def test_folders_to_search_and_blocked_signals(program: Path, tmp_path: Path) -> None:
    """Checks that PYTHONPATH and blocked signals take effect before the module runs, as in a new interpreter."""
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "sitecustomize.py").write_text("import sys; sys.words = 'words'")
    program.write_text("import signal, sys; print(sys.words, signal.pthread_sigmask(signal.SIG_BLOCK, ()))")
    environment = {"PYTHONPATH": str(tmp_path / "search")}
    process = start_module("program", [], env=environment, output=subprocess.PIPE, blocked=[signal.SIGUSR1])
    assert process.communicate(timeout=30)[0] == f"words { {signal.SIGUSR1} }\n"


def spoil() -> str:
    """Changes all state on one rank that outlives a function."""
    import numpy as np
    import torch

    import beit3_ds.training.engine as engine

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    os.environ["SPOILT"] = "1"
    os.chdir("/")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    engine.build_schedule = None  # type: ignore[assignment]
    return describe()


def describe() -> str:
    """Returns the state on one rank that `spoil` changes."""
    import torch

    import beit3_ds.training.engine as engine

    process_group = torch.distributed.is_initialized()
    state = torch.initial_seed(), torch.get_num_threads(), torch.get_default_dtype(), process_group
    own = os.environ.get("SPOILT"), os.getcwd(), signal.getsignal(signal.SIGTERM), engine.build_schedule is None
    return f"{state} {own}"


def test_a_rank_leaves_nothing_to_the_next() -> None:
    fresh = run_ranks(describe, 2)
    spoilt = run_ranks(spoil, 2)
    assert fresh[0] == fresh[1] != spoilt[0] == spoilt[1]
    assert run_ranks(describe, 2) == fresh


def draw() -> tuple[float, float, int]:
    """Returns random numbers of an unseeded process, and the rank."""
    import numpy as np

    return random.random(), float(np.random.random()), os.getpid()


def test_ranks_are_processes_that_draw_for_themselves() -> None:
    """Catches temporary file names or ports that all forked processes choose alike."""
    draws = [*run_ranks(draw, 2), *run_ranks(draw, 2)]
    assert all(len(set(numbers)) == 4 for numbers in zip(*draws, strict=True))


def misbehave(how: str) -> str:
    """Makes rank 1 fail in the given way."""
    if os.environ["RANK"] == "1":
        if how == "fails":
            raise ValueError("words")
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    return how


@pytest.mark.parametrize(
    ("how", "seconds", "error", "message"),
    [
        ("fails", 60, AssertionError, "rank 1 failed:(?s:.*)ValueError: words"),
        ("dies", 60, RuntimeError, "rank 1 ended without a result"),
        ("hangs", 2, TimeoutError, r"ranks \[(0, )?1\] have not finished after 2 s"),
    ],
)
def test_a_rank_that_goes_wrong_is_named(how: str, seconds: int, error: type[Exception], message: str) -> None:
    """Checks that the error names the faulty rank, and that later ranks are unaffected."""
    with pytest.raises(error, match=message):
        run_ranks(misbehave, 2, how, timeout=seconds)
    assert run_ranks(misbehave, 1, "well") == ["well"]


def test_forked_processes_end_with_the_one_that_started_them(program: Path) -> None:
    program.write_text("import signal\nprint('begun', flush=True)\nsignal.pause()")
    code = (
        "import signal, subprocess, tests.preloaded as p; p._MODULES = (); "
        "q = p.start_module('program', [], output=subprocess.PIPE); "
        "q.stdout.readline(); print(q.pid, flush=True); signal.pause()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert starter.stdout is not None
    ended = os.pidfd_open(int(starter.stdout.readline()))
    starter.kill()
    starter.wait()
    assert select.select([ended], [], [], 30)[0]
    os.close(ended)
    starter.stdout.close()
