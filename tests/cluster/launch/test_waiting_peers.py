"""Tests unknown peers that connect to the supervisor.

They must not fill its memory or log, and must not keep guards out.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil

from beit3_ds.cluster.launch.attempt import _STRANGERS
from beit3_ds.cluster.launch.waiting_peers import WaitingPeers
from tests.cluster.launch.running_launch import BOUND_SECONDS, Launch
from tests.listeners import listeners


class FakeChannel:
    """Fakes a connection from an address."""

    def __init__(self, peer_address: str) -> None:
        self.peer_address, self.is_aborted = peer_address, False

    def abort(self) -> None:
        self.is_aborted = True


def channels(*addresses: str) -> list[Any]:
    return [FakeChannel(address) for address in addresses]


def test_strangers_replace_only_themselves() -> None:
    """Catches a limit on peers that refuses the next one or closes the oldest, as either may be a guard."""
    waiting = WaitingPeers(4)
    guards, strangers = channels("10.1.0.1", "10.1.0.2"), channels(*["10.1.0.9"] * 20)
    for channel in (guards[0], *strangers[:10], guards[1], *strangers[10:]):
        waiting.add(channel)
        assert len(waiting) <= 4
    assert not any(guard.is_aborted for guard in guards)
    assert [stranger.is_aborted for stranger in strangers] == [True] * 18 + [False] * 2


def test_an_ipv6_network_counts_as_one_stranger() -> None:
    waiting = WaitingPeers(2)
    guard, *strangers = channels("2001:db8:1::1", *(f"2001:db8::{number}" for number in range(9)))
    for channel in (guard, *strangers):
        waiting.add(channel)
    assert not guard.is_aborted and sum(stranger.is_aborted for stranger in strangers) == 8


def test_a_flood_of_refusals_gives_few_lines() -> None:
    waiting, (channel,) = WaitingPeers(2), channels("10.1.0.9")
    lines = [waiting.describe_refusal(channel, "junk") for _ in range(100_000)]
    said = [line for line in lines if line]
    assert len(said) == 4 + 14  # the first four, then 8, 16, ..., 65536
    assert said[0] == "refused a connection from 10.1.0.9: junk"
    assert said[-1] == "refused a connection from 10.1.0.9: junk (65536 so far; the next line comes at 131072)"


def test_a_guard_gets_in_while_strangers_hold_every_place(launch: Callable[..., Launch]) -> None:
    """Catches a supervisor that keeps any number of unknown peers, or that refuses guards while such peers wait.

    The unknown peers have the guard's own address, which is the harder case.
    """
    run = launch([], "a slots=1\nabsent slots=1\n")
    supervisor = psutil.Process(run.process.pid)
    found: list[tuple[str, int]] = []
    run.wait_until(lambda: found.extend(listeners(supervisor.pid)) or found)
    with contextlib.ExitStack() as strangers:
        before = supervisor.num_fds()
        for _ in range(4 * _STRANGERS):
            strangers.enter_context(socket.create_connection(found[0])).sendall(b"0" * 100)
        time.sleep(0.3)
        assert supervisor.num_fds() - before <= 2 + _STRANGERS + 2  # 256 without a limit
        token = os.fsencode(run.output_dir / "logs" / "attempt_1" / "token").hex()
        options = [f"--address={found[0][0]}", f"--port={found[0][1]}", f"--token={token}", "--keepalive=3"]
        command = [sys.executable, "-m", "beit3_ds.cluster.launch.rank_guard", *options]
        guard = subprocess.Popen(command, env={**os.environ, "RANK": "1", "RUN": str(run.output_dir)})
        run.wait_until(lambda: "started 2 ranks" in run.printed())
        assert run.process.wait(BOUND_SECONDS) == guard.wait(BOUND_SECONDS) == 0, run.printed()
    assert 4 <= run.printed().count("refused a connection") < 20
