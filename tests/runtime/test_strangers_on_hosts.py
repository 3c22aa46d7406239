"""Tests that an outside process with another address and without the secret cannot change the results of a run.

docs/security.md has the table of these cases.
"""

import json
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import pytest

from beit3_ds.checkpoint.folder import CheckpointFolder
from tests.checkpoint.training_run import check_same_state
from tests.cluster.launch.test_launch_hosts import START_SECONDS, HostsLaunch
from tests.cluster.launch.test_plain_launchers import ENVIRONMENT, needs
from tests.hosts import Host, namespace_hosts, write_hostfile
from tests.test_train import losses, write

STEPS = 20
SAVES = 5
HOLD_SECONDS = 4
"""Seconds by which one rank is late, so that others wait for it; a launch fails after ten seconds."""
HARMLESS = ["random", "pickles", "half", "idle", "guard", "read", "write"]
STORE_PORT = 29650
"""Port of rank 0's store under a plain launcher."""


class Run(Protocol):
    """Describes a run on hosts, started by `beit3 launch` or by hand."""

    def printed(self) -> str: ...

    def wait(self, seconds: float) -> int: ...

    def stop(self) -> None: ...


class LaunchedRun(HostsLaunch):
    """Runs `beit3 launch` on hosts."""

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class PlainRun:
    """Starts a rank per host as a plain launcher does; BEIT3_SECRET_FILE names a file with the secret."""

    def __init__(self, hosts: Sequence[Host], config: Path) -> None:
        secret = config.with_name("secret")
        secret.write_bytes(secrets.token_bytes(32))
        secret.chmod(0o600)
        self._log = config.with_name("printed")
        names = {"LOCAL_RANK": 0, "WORLD_SIZE": len(hosts), "MASTER_ADDR": hosts[0].address, "MASTER_PORT": STORE_PORT}
        with self._log.open("a") as log:
            self._ranks = [
                host.start(
                    # nsenter stops itself when its child is stopped, and would stay so.
                    ["bash", "-c", '"$@" & wait $!', "bash", sys.executable, "-m", "beit3_ds.train", str(config)],
                    ENVIRONMENT
                    | {"BEIT3_SECRET_FILE": str(secret), "RANK": str(rank)}
                    | {name: str(value) for name, value in names.items()},
                    stdout=log,
                    stderr=log,
                )
                for rank, host in enumerate(hosts)
            ]

    def printed(self) -> str:
        return self._log.read_text()

    def wait(self, seconds: float) -> int:
        return max(rank.wait(seconds) for rank in self._ranks)

    def stop(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.wait()


class Watch:
    """Watches the listening ports of hosts, lets a stranger attack each new one, and records a run's phases."""

    def __init__(self, hosts: Sequence[Host], stranger: subprocess.Popen[str] | None, begin: str = "") -> None:
        self._hosts, self._stranger, self._begin = hosts, stranger, begin
        self._known: set[tuple[str, int]] = set()
        """Listeners that the stranger has been told of."""
        self.seen: set[tuple[str, int]] = set()
        self.elsewhere: set[tuple[str, int]] = set()
        """Listeners at an address other than that of their host."""
        self.run: Run | None = None
        self.began: dict[str, float] = {}
        """Start time of each phase."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            for host in self._hosts:
                for address, port in host.listeners() - self.seen:
                    self.seen.add((address, port))
                    if address != host.address:
                        self.elsewhere.add((address, port))
            if self._begin in self._printed():
                self._tell_stranger()
            for phase in self._phases():
                self.began.setdefault(phase, time.time())

    def _tell_stranger(self) -> None:
        if self._stranger is not None and self._stranger.stdin is not None:
            for address, port in self.seen - self._known:
                self._known.add((address, port))
                with suppress(BrokenPipeError):
                    self._stranger.stdin.write(f"{address} {port}\n")
                    self._stranger.stdin.flush()

    def _printed(self) -> str:
        return self.run.printed() if self.run is not None else ""

    def _phases(self) -> list[str]:
        """Returns the phases that have begun."""
        printed = self._printed()
        ports = [sum(address == host.address for address, _ in self.seen) for host in self._hosts]
        signs = {
            "start": bool(printed) or any(ports),
            "gather": "started 2 ranks" in printed,
            "form groups": any(ports[1:]),  # gloo's, because the store and the supervisor are on the first host
            "steps": f"step 1/{STEPS}" in printed,
            "save and end": f"step {STEPS}/" in printed,
        }
        return [phase for phase, has_begun in signs.items() if has_begun]


class Attacked:
    """Holds the remains of a run that a stranger attacked."""

    def __init__(self, status: int, printed: str, folder: Path, watch: Watch, attacks: list[tuple[float, str]]) -> None:
        self.status, self.printed, self.folder, self.watch, self._attacks = status, printed, folder, watch, attacks

    def output(self) -> str:
        """Returns everything that the launch and all ranks printed."""
        logs = sorted(self.folder.glob("run/logs/attempt_*/rank_*.log"))
        return self.printed + "".join(path.read_text() for path in logs)

    def count_attacks(self) -> dict[str, int]:
        """Returns the number of attacks in each phase of the run."""
        began = sorted(self.watch.began.items(), key=lambda item: item[1])
        return Counter(next((p for p, at in reversed(began) if at <= when), "before") for when, _ in self._attacks)


@pytest.fixture(scope="module")
def three_hosts() -> Iterator[list[Host]]:
    """Returns two hosts for runs and one host for the stranger."""
    with namespace_hosts(3) as hosts:
        yield hosts


@pytest.fixture
def mapping(run_mapping: dict[str, Any]) -> dict[str, Any]:
    own = run_mapping["beit3_ds"]
    own["training"] |= {"total_steps": STEPS, "eval_interval": 10, "save_interval": SAVES, "keep_checkpoints": 9}
    own["parallel"] = {"timeout_seconds": 25, "heartbeat_timeout_seconds": 12}
    return run_mapping


@contextmanager
def stranger(host: Host, folder: Path, attacks: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Starts the stranger on a host; `folder / "attacks"` lists the attacks that it made."""
    argv = [sys.executable, "-m", "tests.runtime.stranger", str(folder / "bomb"), *attacks]
    with (folder / "attacks").open("w") as file:
        process = host.start(argv, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.DEVNULL, text=True)
        try:
            deadline = time.monotonic() + START_SECONDS
            while "ready" not in (folder / "attacks").read_text():
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
            yield process
        finally:
            process.kill()
            process.communicate()
            host.clear()


def run_attacked(
    hosts: Sequence[Host],
    mapping: Mapping[str, Any],
    folder: Path,
    attacks: Sequence[str],
    start: Callable[[list[Host], Path], Run] | None = None,
    begin: str = "",
) -> Attacked:
    """Trains on the first two hosts while the third one attacks; one rank joins the others late.

    Args:
        hosts: the three hosts.
        mapping: configuration of the run.
        folder: folder of the run, which is created.
        attacks: names of methods of `Stranger`.
        start: starts the run; None starts `beit3 launch`.
        begin: text that the run prints before the stranger begins.
    """
    folder.mkdir()
    own = json.loads(json.dumps(mapping))
    own["beit3_ds"]["training"]["output_dir"] = str(folder / "run")
    hostfile, config = write_hostfile(folder / "hostfile", hosts[:2]), write(own, folder)
    with stranger(hosts[2], folder, attacks) as process:
        watch = Watch(hosts[:2], process, begin)
        run = start(list(hosts[:2]), config) if start else LaunchedRun(list(hosts[:2]), hostfile, config)
        watch.run = run
        try:
            hold_second_rank(hosts[1], run)
            status = run.wait(START_SECONDS)
        finally:
            watch.stop()
            run.stop()
            for host in hosts[:2]:
                host.clear()
    lines = [line.split() for line in (folder / "attacks").read_text().splitlines()]
    done = [(float(words[0]), words[3]) for words in lines if len(words) == 4]
    return Attacked(status, run.printed(), folder, watch, done)


def hold_second_rank(host: Host, run: Run) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not (pids := host.pids(r"^\S*python\S* .*-m beit3_ds\.train")):
        assert time.monotonic() < deadline, run.printed()
        time.sleep(0.01)
    host.signal(pids[0], signal.SIGSTOP)
    time.sleep(HOLD_SECONDS)
    host.signal(pids[0], signal.SIGCONT)


@pytest.fixture(scope="module")
def found() -> dict[str, Path]:
    """Holds the output folder of the undisturbed run once a test has run it."""
    return {}


@pytest.fixture
def undisturbed(found: dict[str, Path], three_hosts: list[Host], mapping: dict[str, Any], tmp_path: Path) -> Path:
    """Returns the output folder of a run without attacks."""
    if not found:
        run = run_attacked(three_hosts, mapping, tmp_path / "undisturbed", [])
        assert run.status == 0, run.output()
        check_listeners(run)
        found["run"] = run.folder / "run"
    return found["run"]


def check_listeners(run: Attacked) -> None:
    """Checks that both hosts had listeners, and only at the address that the ranks use."""
    assert run.watch.elsewhere == set()
    assert {address for address, _ in run.watch.seen} == {"10.1.0.1", "10.1.0.2"}


def check_result(run: Attacked, expected: Path) -> None:
    """Checks that the records and checkpoints equal those of the undisturbed run bit for bit.

    A failed run may have fewer of them, but no different ones.
    """
    assert not (run.folder / "bomb").exists()
    assert run.watch.elsewhere == set()
    metrics = run.folder / "run" / "metrics.jsonl"
    ours = losses(run.folder / "run") if metrics.exists() else []
    assert ours == losses(expected)[: None if run.status == 0 else len(ours)]
    steps = {path.name for path in (run.folder / "run" / "checkpoints").glob("step-*")}
    assert run.status or len(steps) == STEPS // SAVES
    for name in steps:
        folders = (run.folder / "run", expected)
        check_same_state(*(CheckpointFolder(folder / "checkpoints" / name) for folder in folders))


@pytest.mark.slow
@needs("pdsh")
@pytest.mark.parametrize("start", [None, PlainRun], ids=["beit3 launch", "plain launcher"])
def test_a_stranger_changes_nothing_in_any_phase(
    start: Callable[[list[Host], Path], Run] | None,
    three_hosts: list[Host],
    undisturbed: Path,
    mapping: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Sends random bytes, pickles, partial messages and valid messages to every port as soon as it listens."""
    run = run_attacked(three_hosts, mapping, tmp_path / "attacked", HARMLESS, start)
    assert run.status == 0, run.output()
    check_result(run, undisturbed)
    check_listeners(run)
    numbers = run.count_attacks()
    print(dict(numbers))
    phases = {"start", "gather", "form groups", "steps", "save and end"} - ({"gather"} if start else set())
    assert all(numbers[phase] > 0 for phase in phases), numbers
    assert "Traceback" not in run.output()


AMID_STEPS = "step 3/"
SAID_OF_FORGERY = "that no rank of this run wrote|a program on the network"
SAID_OF_LOSS = "does not answer|lost contact|could not all connect|did not come within|ended, or lost contact"
SAID_OF_FILES = "accept: Too many open files"  # gloo aborts the process: it keeps each connection that it does not know


@pytest.mark.slow
@needs("pdsh")
@pytest.mark.parametrize(
    ("attack", "begin", "message"),
    [
        ("overwrite", "", SAID_OF_FORGERY),
        ("overwrite", AMID_STEPS, SAID_OF_FORGERY),
        ("overwrite_ranks", "", SAID_OF_FORGERY),
        ("overwrite_verdict", "", SAID_OF_FORGERY),
        ("overwrite_addresses", "", SAID_OF_FORGERY),
        ("count", "", f"{SAID_OF_FORGERY}|{SAID_OF_LOSS}"),
        ("delete", "", f"{SAID_OF_FORGERY}|{SAID_OF_LOSS}"),
        ("delete", AMID_STEPS, f"{SAID_OF_FORGERY}|{SAID_OF_LOSS}"),
        ("replay", "", f"program on the network writes old values again|{SAID_OF_LOSS}"),
        ("many", "", f"{SAID_OF_LOSS}|{SAID_OF_FILES}"),
        ("sequence", "", f"{SAID_OF_LOSS}|{SAID_OF_FILES}"),
        ("sequence", AMID_STEPS, f"{SAID_OF_LOSS}|{SAID_OF_FILES}"),
    ],
)
def test_a_stranger_in_torchs_sockets_ends_a_run_but_changes_no_result(
    attack: str,
    begin: str,
    message: str,
    three_hosts: list[Host],
    undisturbed: Path,
    mapping: dict[str, Any],
    tmp_path: Path,
) -> None:
    run = run_attacked(three_hosts, mapping, tmp_path / "attacked", [attack], begin=begin)
    said = re.findall(r"error on rank \d.*", run.output())
    print(attack, "status", run.status, dict(run.count_attacks()), *said, sep="\n")
    check_result(run, undisturbed)
    assert run.count_attacks()
    if run.status:
        assert re.search(message, run.output()), run.output()
        assert "Traceback" not in run.printed  # a rank's own log may hold one, of the connection that it lost


@pytest.mark.slow
@needs("pdsh")
def test_a_process_alone_listens_nowhere(three_hosts: list[Host], mapping: dict[str, Any], tmp_path: Path) -> None:
    watch = Watch(three_hosts[:1], None)
    done = three_hosts[0].run(
        [sys.executable, "-m", "beit3_ds.train", str(write(mapping, tmp_path))], ENVIRONMENT, timeout=START_SECONDS
    )
    watch.stop()
    assert done.returncode == 0, done.stdout
    assert watch.seen == set()
