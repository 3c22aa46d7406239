"""Tests that ranks that cannot meet report the reason in time."""

import contextlib
import json
import math
import queue
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from beit3_ds.config import ConfigError
from beit3_ds.runtime import rendezvous
from beit3_ds.runtime.keyed_store import KeyedStore
from beit3_ds.runtime.launch_environment import Launch
from beit3_ds.runtime.rendezvous import Rendezvous, find_differences

SECRET = b"a secret of the tests"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Starts a program that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(rank: int, world_size: int, port: int, address: str = "127.0.0.1") -> Launch:
    place = {"local_rank": rank, "local_size": world_size, "master_addr": address, "master_port": port}
    return Launch(launcher="a test", rank=rank, world_size=world_size, **place)


def meet(rank: Launch, seconds: float, together: threading.Barrier | None = None) -> str:
    """Returns the rank's last message; `together` replaces the process group, which takes over rank 0's store."""
    with Rendezvous(rank, seconds, SECRET) as meeting:
        try:
            meeting.meet()
        except ConfigError as error:
            return str(error)
        assert together is not None, "a rank met others that do not exist"
        together.wait(60)
    return "met"


def test_all_meet_whoever_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that ranks wait for a late rank 0: a host that refuses connections is up."""
    monkeypatch.setattr(rendezvous, "SILENCE_SECONDS", 0.1)
    port, together = free_port(), threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        early = [pool.submit(meet, launch(rank, 3, port), 60, together) for rank in (1, 2)]
        time.sleep(1)  # they find nobody listening
        assert not any(future.done() for future in early)
        assert meet(launch(0, 3, port), 60, together) == "met"
        assert [future.result() for future in early] == ["met", "met"]


def test_ranks_that_do_not_come_are_named_on_all(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "NOTICE_SECONDS", 1.0)
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        lines = list(pool.map(meet, [launch(rank, 8, port) for rank in (0, 2, 6)], [3] * 3))
    for line in lines:
        assert "ranks 1, 3-5, 7 of 8 did not come within 3 s to MASTER_ADDR=127.0.0.1" in line
    notice = f"has waited 1 s for ranks 1, 3-5, 7 of 8 to come to MASTER_ADDR=127.0.0.1, MASTER_PORT={port}"
    assert notice in capfd.readouterr().err


def test_a_taken_port_is_named(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    line = meet(launch(0, 2, port), 60)
    assert line.startswith(f"rank 0 cannot listen on host {socket.gethostname()}: port {port} is in use")
    assert "--master_port P" in line


def test_nobody_listens() -> None:
    """Checks the error if nobody listens, also for a loopback MASTER_ADDR, as from a hostfile with `localhost`."""
    line = meet(launch(1, 2, port := free_port()), 1)
    assert f"cannot reach rank 0 at MASTER_ADDR=127.0.0.1, MASTER_PORT={port}: its host answers" in line
    assert "127.0.0.1 is this host itself" in line and "--master_addr A" in line


def test_a_host_without_an_answer_is_not_waited_for_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that a silent host is given up earlier than a slow rank, because a host that is up answers."""
    monkeypatch.setattr(rendezvous, "SILENCE_SECONDS", 1.0)

    def time_out(*_: object, **__: object) -> socket.socket:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", time_out)
    start = time.monotonic()
    line = meet(launch(1, 2, 29500, "10.1.2.3"), 60)
    assert "cannot reach rank 0 at MASTER_ADDR=10.1.2.3, MASTER_PORT=29500: timed out" in line
    assert time.monotonic() - start < 50


def test_a_program_that_never_answers_ends_the_rank(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches an endless wait in torch's store, which ignores its timeout in this case."""
    monkeypatch.setattr(rendezvous, "_GRACE_SECONDS", 0.5)
    ended: queue.Queue[int] = queue.Queue()
    meeting = Rendezvous(launch(1, 2, listener.getsockname()[1]), 1, SECRET, ended.put)

    def stay() -> None:
        with meeting, contextlib.suppress(ConfigError):
            meeting.meet()  # until the other program ends

    threading.Thread(target=stay, daemon=True).start()
    assert ended.get(timeout=60) == 2
    assert "has waited 2 s for the store at MASTER_ADDR=127.0.0.1" in (line := capfd.readouterr().err)
    assert line.startswith("error on rank 1: host ") and "does not answer. The run ends." in line


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> list[object]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    place = "MASTER_ADDR=nodeO, MASTER_PORT=29500: Name or service not known"
    first, second = (meet(launch(rank, 2, 29500, "nodeO"), 1) for rank in (0, 1))
    assert "cannot resolve its own address" in first and place in first
    assert "cannot reach rank 0" in second and place in second


def test_what_gloo_says_is_explained() -> None:
    meeting = Rendezvous(launch(1, 2, 29500, "node0"), 1, SECRET)
    line = str(meeting.explain(RuntimeError("Gloo connectFullMesh failed with Connection refused\nmore")))
    assert "met at MASTER_ADDR=node0, MASTER_PORT=29500, but could not all connect to each other: Gloo" in line
    assert "GLOO_SOCKET_IFNAME (lo here)" in line and "\n" not in line


def test_other_software_is_named_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the error on all hosts if one has an older torch or older code."""
    versions = iter(["2.14.1", "2.13.0", "2.14.1"])
    monkeypatch.setattr(rendezvous, "describe_versions", lambda: {"torch": next(versions), "code": "a"})
    port, together = free_port(), threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(lambda rank: meet(launch(rank, 3, port), 60, together), range(3)))
    assert len(set(said)) == 1
    assert "has torch 2.13.0, rank 0 (host " in said[0] or "have torch 2.14.1, rank 0" in said[0], said[0]
    assert "check-cluster" in said[0]


def test_differences_are_grouped_by_host() -> None:
    def rank(host: str, torch: str, code: str = "a") -> dict[str, Any]:
        return {"host": host, "software": {"torch": torch, "code": code}}

    ranks = [rank("h0", "2.14"), rank("h0", "2.14"), rank("h1", "2.13"), rank("h1", "2.13"), rank("h2", "2.14", "b")]
    said = find_differences(ranks)
    assert said is not None
    assert said.startswith(
        "ranks 2-3 (host h1) have torch 2.13, rank 0 (host h0) has 2.14; rank 4 (host h2) has the project's code in "
        "another state (b), rank 0 (host h0) has a. All ranks must run the same software"
    )
    assert find_differences(ranks[:2]) is None


def test_another_secret_is_named() -> None:
    """Checks that a rank with another secret reports it, while rank 0 still waits for the right rank."""
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, launch(0, 2, port), 4)
        meeting = Rendezvous(launch(1, 2, port), 4, b"the secret of another run")
        with meeting, pytest.raises(ConfigError, match=r"has another secret than this rank.*BEIT3_SECRET_FILE=FILE"):
            meeting.meet()
        assert "rank 1 of 2 did not come within 4 s" in first.result()


@pytest.mark.parametrize("sign", ["the folder", "the launcher"])
def test_ranks_of_a_refused_start_get_no_place(monkeypatch: pytest.MonkeyPatch, sign: str) -> None:
    """Checks two starts with equal port and secret, where rank 0 of the other start is refused.

    Rank 1 of the other start reaches this rank 0 first, and must not take a place.
    """
    monkeypatch.setattr(rendezvous, "_CONTENDER_SECONDS", 0.5)
    port, together, contended = free_port(), threading.Barrier(2), [-math.inf]

    class Foreign(Rendezvous):
        """Sends its values until its launcher ends it."""

        def _receive_answer(self, base: Any, own: Any) -> Any:
            invitation = KeyedStore(base, SECRET)
            while not base.check(["challenge"]):
                time.sleep(0.01)
            store = KeyedStore(base, self._derive_key("challenge", invitation.get("challenge").decode()))
            if sign == "the folder":
                contended[0] = time.monotonic()
            else:  # its rank 0 has not asked for the folder yet
                own["parent"] = 1
            store.set("rank/1", json.dumps(own))
            raise ConfigError("ended")

    def begin() -> str:
        with Rendezvous(launch(0, 2, port), 60, SECRET, contended_at=lambda: contended[0]) as meeting:
            meeting.meet()
            together.wait(60)
        return "met"

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(begin)
        with Foreign(launch(1, 2, port), 60, SECRET) as foreign, pytest.raises(ConfigError, match="ended"):
            foreign.meet()
        time.sleep(0.3)  # rank 0 has the values of all ranks
        assert meet(launch(1, 2, port), 20, together) == "met"
        assert first.result() == "met"
