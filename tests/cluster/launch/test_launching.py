"""`beit3 launch` with stand-ins for trainer, launcher and ssh: failures, signals, statuses, restarts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.run_config import small_run_mapping

STEPS = 30
BOUND_SECONDS = 60


class Launch:
    """A launch in a folder, as a process of its own."""

    def __init__(self, folder: Path, hosts: str, faults: list[Any], steps: int = STEPS, **options: Any) -> None:
        self.output_dir = folder / "run"
        mapping = small_run_mapping(0, samples=(12, 12, 12))
        mapping["beit3_ds"]["training"] |= {"output_dir": str(self.output_dir), "total_steps": steps, "warmup_steps": 1}
        (folder / "config.json").write_text(json.dumps(mapping))
        (folder / "hosts").write_text(hosts)
        options = {"hostfile": str(folder / "hosts"), "config": str(folder / "config.json"), **options}
        options["environment"] = [f"FAULTS={json.dumps(faults)}", *options.get("environment", [])]
        self._printed = folder / "printed"
        with self._printed.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster.launch.fake_launch", json.dumps(options)],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def printed(self) -> str:
        return self._printed.read_text()

    def log(self, rank: int, attempt: int = 1) -> str:
        path = self.output_dir / "logs" / f"attempt_{attempt}" / f"rank_{rank}.log"
        return path.read_text() if path.exists() else ""

    def pid(self, pattern: str) -> int:
        """The one descendant whose command line has a match of a pattern."""
        (pid,) = (pid for pid, line in self.descendants().items() if re.search(pattern, line))
        return pid

    def descendants(self) -> dict[int, str]:
        """Command lines of all processes that were started for this launch: they hold its output folder or its log."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                environment = (path / "environ").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(self.output_dir.parent) in f"{line} {environment}" and int(path.name) != self.process.pid:
                found[int(path.name)] = line
        return found

    def wait(self, but: str = "$none") -> int:
        """Waits for the end; nothing may be left then, except after a guard was killed.

        Args:
            but: pattern of command lines that may be left: real workers end with their rank, its stand-in does not.
        """
        status = self.process.wait(BOUND_SECONDS)
        self.wait_until(lambda: all(re.search(but, line) for line in self.descendants().values()), alive=False)
        return status

    def wait_until(self, happened: Callable[[], Any], alive: bool = True) -> None:
        deadline = time.monotonic() + BOUND_SECONDS
        while not happened():
            assert time.monotonic() < deadline, (self.printed(), self.descendants())
            assert not alive or self.process.poll() is None, self.printed()
            time.sleep(0.01)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.descendants():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    """Starts a launch; what it leaves is killed."""
    started = []

    def start(faults: list[Any], hosts: str = "localhost slots=3\n", **options: Any) -> Launch:
        started.append(Launch(tmp_path, hosts, faults, **options))
        return started[-1]

    yield start
    for one in started:
        one.end()


def test_a_run_to_its_end(launch: Callable[..., Launch]) -> None:
    """Logs of all ranks, the output of rank 0 here, the environment passed on, the data-loader's workers gone."""
    run = launch([], environment=['GREETING=it\'s a "day"\n'])
    assert run.wait() == 0
    assert f"finished: {STEPS} steps" in run.printed()
    assert f"\nstep {STEPS}\n" in run.printed()
    for rank in range(3):
        assert re.match(rf"rank {rank} of 3, worker \d+, from step 0, it's a \"day\"\n\n", run.log(rank))
    assert "rank 1 of 3" not in run.printed()
    assert not list(run.output_dir.glob("logs/*/token"))


@pytest.mark.parametrize(
    ("what", "text", "status"),
    [
        ("SIGKILL", "was killed by SIGKILL (the kernel does that when memory runs out", 1),
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
    """The others wait for it for ever, and so would their launcher."""
    run = launch([[1, 5, "SIGSTOP"]])
    assert run.wait() == 1
    assert re.search(r"FAILED .* rank 1 on host \S+ has been stopped \(state T\) for \d+ s", run.printed())
    assert "    | rank 1 meets SIGSTOP" in run.printed()
    assert "ranks 0, 2 were killed by SIGKILL by the launcher" in run.printed()


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
    """Also a rank that does not stop when asked."""
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
    """Slurm and mpirun signal what they have started, and that are the guards."""
    run = launch([], steps=10000)
    run.wait_until(lambda: "step 5\n" in run.printed())
    guard = next(pid for pid, line in run.descendants().items() if "rank_guard" in line)
    os.kill(guard, signal.SIGUSR1)
    assert run.wait() == 128 + signal.SIGUSR1
    assert re.search(r"rank \d on host \S+ has received SIGUSR1: asking all ranks to save and stop", run.printed())


def test_a_killed_guard_takes_its_rank_along(launch: Callable[..., Launch]) -> None:
    run = launch([], steps=10000)
    run.wait_until(lambda: "step 5\n" in run.printed())
    guards = {pid for pid, line in run.descendants().items() if "rank_guard" in line}
    os.kill(min(guards), signal.SIGKILL)
    assert run.wait(but="^sleep") == 1
    assert re.search(r"FAILED .* rank \d on host \S+ lost its guard \(process \d+\)", run.printed())


@pytest.mark.slow
def test_a_silent_guard_is_lost(launch: Callable[..., Launch]) -> None:
    """As if its host or its network were down; nothing on this machine is left either."""
    run = launch([], steps=10000)
    run.wait_until(lambda: "step 5\n" in run.printed())
    guard = min(pid for pid, line in run.descendants().items() if "rank_guard" in line)
    os.kill(guard, signal.SIGSTOP)
    assert run.wait(but="^sleep") == 1
    assert re.search(r"FAILED .* host \S+ \(rank \d\) has been silent for 3 s", run.printed())


def test_ranks_end_when_their_supervisor_is_gone(launch: Callable[..., Launch]) -> None:
    """They save if they can; one that does not stop when asked is killed after the time of silence."""
    run = launch([[1, 5, "ignore"]], steps=10000)
    run.wait_until(lambda: "step 7\n" in run.printed())
    run.process.kill()
    run.wait()
    assert "rank 0 stops on ['SIGTERM']" in run.log(0)
    assert "rank 1 stops" not in run.log(1)


@pytest.mark.slow
def test_ranks_end_when_their_supervisor_is_silent(launch: Callable[..., Launch]) -> None:
    run = launch([], steps=10000)
    run.wait_until(lambda: "step 5\n" in run.printed())
    run.process.send_signal(signal.SIGSTOP)
    run.wait_until(lambda: not any("fake_trainer" in line for line in run.descendants().values()))


def test_restarts_go_on_from_the_newest_checkpoint(launch: Callable[..., Launch]) -> None:
    """Two faults, two restarts; what follows is not counted anew."""
    run = launch([[1, 5, "SIGKILL"], [0, 10, 3]], restarts=2)
    assert run.wait() == 0
    assert "restart 1 of 2: 3 ranks on localhost (3), from the checkpoint of step 5\n" in run.printed()
    assert "restart 2 of 2: 3 ranks on localhost (3), from the checkpoint of step 10\n" in run.printed()
    assert [run.log(2, attempt).split(", ")[2] for attempt in (1, 2, 3)] == [
        "from step 0",
        "from step 5",
        "from step 10",
    ]
    steps = re.findall(r"^step (\d+)$", run.printed(), re.MULTILINE)
    assert list(map(int, steps)) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_restarts_are_counted(launch: Callable[..., Launch]) -> None:
    run = launch([[1, 5, 3], [1, 6, 3], [1, 7, 3]], restarts=1)
    assert run.wait() == 1
    assert "the run has failed (restarted 1 time); the same command resumes from the checkpoint of step 6" in (
        run.printed()
    )


def test_a_restart_without_a_host_has_fewer_ranks(launch: Callable[..., Launch], tmp_path: Path) -> None:
    """Five slots are left, and all are used, though the samples of a step do not divide by five."""
    run = launch([[3, 5, "SIGKILL"]], "a slots=1\nb slots=3\nc slots=2\n", restarts=1)
    run.wait_until(lambda: "FAILED" in run.printed())
    (tmp_path / "unreachable").write_text("a")
    assert run.wait() == 0
    expected = "without a (not reachable): 5 ranks instead of 6 on b (3), c (2), from the checkpoint of step 5\n"
    assert f"restart 1 of 1 {expected}" in run.printed()
    assert run.log(3, 2).startswith("rank 3 of 5, ")
    assert (run.output_dir / "logs" / "attempt_2" / "hostfile").read_text() == "b slots=3\nc slots=2\n"


def test_no_restart_below_the_smallest_number_of_ranks(launch: Callable[..., Launch], tmp_path: Path) -> None:
    run = launch([[0, 5, "SIGKILL"]], "a slots=3\nb slots=1\n", restarts=1, min_ranks=4)
    run.wait_until(lambda: "FAILED" in run.printed())
    (tmp_path / "unreachable").write_text("b")
    assert run.wait() == 1
    assert "no restart without b (not reachable): the layout of" in run.printed()
    assert "fits no number of ranks between 4 (--min-ranks) and 3" in run.printed()


@pytest.mark.slow
def test_hosts_that_do_not_come_are_named(launch: Callable[..., Launch]) -> None:
    """And what still waits for them on this machine is ended."""
    run = launch([], "a slots=2\nabsent slots=2\n", start_seconds=4.0)
    assert run.wait() == 1
    assert re.search(r"FAILED after \d+ s: ranks 2-3 \(host absent\) did not start within 4 s", run.printed())
    assert not run.log(0)


def test_a_signal_before_the_start_stops_at_once(launch: Callable[..., Launch]) -> None:
    run = launch([], "a slots=2\nabsent slots=1\n", restarts=3)
    run.wait_until(lambda: any("rank_guard" in line for line in run.descendants().values()))
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM
    assert "stopped by SIGTERM: no step was done, nothing to save" in run.printed()
    assert not run.log(0)


def test_a_guard_says_why_it_cannot_work(tmp_path: Path) -> None:
    def guard(token: Path) -> str:
        arguments = ["--address=127.0.0.1", "--port=9", f"--token={token}", "--keepalive=5"]
        command = [sys.executable, "-m", "beit3_ds.cluster.launch.rank_guard", *arguments]
        done = subprocess.run(command, env={**os.environ, "RANK": "3"}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        return done.stderr

    assert "The log folder must be on storage that all hosts share: name one with --log-dir" in guard(tmp_path / "no")
    (tmp_path / "token").write_text("a")
    said = guard(tmp_path / "token")
    assert re.match(r"beit3 launch: rank 3 on host \S+ cannot reach the supervisor at 127.0.0.1 port 9: ", said)


def test_what_cannot_work_is_said_before_anything_starts(launch: Callable[..., Launch], tmp_path: Path) -> None:
    (tmp_path / "unreachable").write_text("b")
    run = launch([], "a slots=3\nb slots=1\n")
    assert run.wait() == 2
    assert re.search(r"hosts: host b cannot be reached: no route to host\. Fix it or remove it", run.printed())
    run = launch([], "a slots=999\n")
    assert run.wait() == 2
    assert "999 ranks" in run.printed()  # more than the samples of a step
    assert not list(run.output_dir.glob("logs/attempt_*"))
