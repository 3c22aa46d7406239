"""Tests that the first failure of an attempt is reported, and that no process is left behind."""

import os
import re
import signal
from collections.abc import Callable

import pytest

from tests.cluster.launch.running_launch import Launch


@pytest.mark.parametrize(
    ("what", "text", "status"),
    [
        ("SIGKILL", "was killed by SIGKILL (the kernel does that if memory runs out", 1),
        pytest.param("SIGSEGV", "was killed by SIGSEGV", 1, marks=pytest.mark.slow),
        pytest.param(3, "ended with status 3", 1, marks=pytest.mark.slow),
        (2, "ended with status 2", 2),
    ],
)
def test_the_first_failure_is_shown_and_ends_all(
    launch: Callable[..., Launch], what: str | int, text: str, status: int
) -> None:
    run = launch([[1, 5, what]], restarts=0 if status == 1 else 3)
    assert run.wait() == status
    failed = re.search(r"FAILED after \d+ s: rank 1 on host (\S+) (.*)\n((?:    \| .*\n)+)", run.printed())
    assert failed and failed[2].startswith(text)
    assert f"    | rank 1 meets {what}\n" in failed[3]
    # What the others say of it comes later, and not through rank 0's output.
    ends = run.printed()[failed.end() :]
    assert f"ranks 0, 2 ended with status 1\n    | error on rank 0: rank 1 does not answer ({what})" in ends
    assert "\nerror on rank 0" not in run.printed()
    if status == 2:
        assert "this needs a change" in ends and "restart" not in ends


def test_a_stopped_rank_is_found_and_killed(launch: Callable[..., Launch]) -> None:
    """Checks that a stopped rank is found and killed, although other ranks and the launcher would wait forever."""
    run = launch([[1, 5, "SIGSTOP"]])
    assert run.wait() == 1
    assert re.search(r"FAILED .* rank 1 on host \S+ has been stopped \(state T\) for \d+ s", run.printed())
    assert "    | rank 1 meets SIGSTOP" in run.printed()
    assert "ranks 0, 2 were killed by SIGKILL by the launcher" in run.printed()


def test_a_killed_guard_takes_its_rank_along(launch: Callable[..., Launch]) -> None:
    run = launch([], steps=10000)
    run.wait_until(lambda: "step 5\n" in run.printed())
    guards = {pid for pid, line in run.descendants().items() if "rank_guard" in line}
    os.kill(min(guards), signal.SIGKILL)
    assert run.wait(but="^sleep") == 1
    assert re.search(r"FAILED .* rank \d on host \S+ lost its guard \(process \d+\)", run.printed())


@pytest.mark.slow
def test_a_silent_guard_is_lost(launch: Callable[..., Launch]) -> None:
    """Checks a stopped guard, which looks like a host or network that is down; no process may be left here."""
    run = launch([], steps=10000)
    run.wait_until(lambda: "step 5\n" in run.printed())
    guard = min(pid for pid, line in run.descendants().items() if "rank_guard" in line)
    os.kill(guard, signal.SIGSTOP)
    assert run.wait(but="^sleep") == 1
    assert re.search(r"FAILED .* host \S+ \(rank \d\) has been silent for 3 s", run.printed())


@pytest.mark.slow
def test_hosts_that_do_not_come_are_named(launch: Callable[..., Launch]) -> None:
    """Checks that missing hosts are named, and that processes that wait for them end."""
    run = launch([], "a slots=2\nabsent slots=2\n", start_seconds=4.0)
    assert run.wait() == 1
    assert re.search(r"FAILED after \d+ s: ranks 2-3 \(host absent\) did not start within 4 s", run.printed())
    assert not run.log(0)
