"""Tests that stop signals to the launch or to its guards reach all ranks."""

import os
import re
import signal
import time
from collections.abc import Callable

import pytest

from tests.cluster.launch.running_launch import Launch


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)),
    ],
)
def test_a_signal_stops_all_ranks_after_their_step(launch: Callable[..., Launch], number: signal.Signals) -> None:
    run = launch([], steps=10000, restarts=2)
    run.wait_until(lambda: "step 5\n" in run.printed())
    run.process.send_signal(number)
    passed = signal.SIGTERM if number == signal.SIGHUP else number
    assert run.wait() == 128 + passed
    assert all(f"rank {rank} stops on ['{passed.name}']" in run.log(rank) for rank in range(3))
    (done,) = re.findall(r"the checkpoint of step (\d+) of 10000 is saved", run.printed())
    assert int(done) >= 5 and f"\nstep {done}\n" in run.printed()
    assert "FAILED" not in run.printed() and "restart" not in run.printed()


def test_a_second_interrupt_kills(launch: Callable[..., Launch]) -> None:
    """Checks that a second interrupt kills even a rank that ignores the first."""
    run = launch([[1, 5, "ignore"]], steps=10000, restarts=2)
    run.wait_until(lambda: "step 7\n" in run.printed())
    run.process.send_signal(signal.SIGINT)
    run.wait_until(lambda: "rank 0 stops on ['SIGINT']" in run.log(0))
    time.sleep(0.2)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 1
    assert "second SIGINT: killing all ranks" in run.printed() and "restart 1" not in run.printed()


def test_a_signal_that_a_guard_receives_counts(launch: Callable[..., Launch]) -> None:
    """Checks stop signals to guards: Slurm and mpirun signal the processes that they started."""
    run = launch([], steps=10000)
    run.wait_until(lambda: "step 5\n" in run.printed())
    guard = next(pid for pid, line in run.descendants().items() if "rank_guard" in line)
    os.kill(guard, signal.SIGUSR1)
    assert run.wait() == 128 + signal.SIGUSR1
    assert re.search(r"rank \d on host \S+ has received SIGUSR1: asking all ranks to save and stop", run.printed())


def test_a_signal_before_the_start_stops_at_once(launch: Callable[..., Launch]) -> None:
    run = launch([], "a slots=2\nabsent slots=1\n", restarts=3)
    run.wait_until(lambda: any("rank_guard" in line for line in run.descendants().values()))
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM
    assert "stopped by SIGTERM: no step was done, nothing to save" in run.printed()
    assert not run.log(0)
