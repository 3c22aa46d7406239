"""Connects the ranks before a process group exists; names ranks that are late or cannot be reached."""

import errno
import ipaddress
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn

import psutil
import torch.distributed as dist

from beit3_ds.config import ConfigError
from beit3_ds.cores import describe_cores, divide_cores
from beit3_ds.rank_names import join_ranks
from beit3_ds.runtime.launch_environment import Launch
from beit3_ds.runtime.versions import describe_versions

SILENCE_SECONDS = 60.0
"""Seconds without an answer from rank 0's host after which a rank gives up. A refused connection is an answer, because
rank 0 may still be opening its files."""
NOTICE_SECONDS = 30.0
"""Seconds between two messages of a waiting rank."""
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 10.0  # time for other ranks to read from rank 0 that one is missing, or to fail by themselves
_LISTED = 8  # most differences that a message names
_WAYS_OUT = (
    "Name an address of rank 0's host that all others reach, and a port that is free there: deepspeed --master_addr A "
    "--master_port P; mpirun -x MASTER_ADDR=A -x MASTER_PORT=P; export MASTER_ADDR=A MASTER_PORT=P before srun."
)


class Rendezvous:
    """Connects a starting rank with all others, and prints which ranks are missing.

    Ranks meet in the store of rank 0, where each writes its address and the versions of its software. A thread prints
    what this rank waits for, and ends the process if a call into torch blocks for too long.
    """

    def __init__(self, launch: Launch, seconds: float, end: Callable[[int], None] = os._exit) -> None:
        """Prepares to connect; `meet` makes the first connection.

        Args:
            launch: this rank, with the address of rank 0.
            seconds: longest time that ranks wait for each other.
            end: ends this process, even if its main thread is blocked in a call.
        """
        self._launch, self._seconds, self._end = launch, seconds, end
        self._host = socket.gethostname()
        self._waits_for: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rendezvous", daemon=True)
        self._store: dist.TCPStore | None = None
        self.num_threads = 1
        """Number of threads that fits this rank's share of its host's cores; known after `meet`."""

    def __enter__(self) -> "Rendezvous":
        self._start = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._store = None  # the store of torch's process group keeps the server of rank 0 alive

    def meet(self) -> None:
        """Waits until all ranks have connected, and chooses gloo's network interface; sends a few bytes per rank.

        Raises:
            ConfigError: if rank 0's host does not answer for `SILENCE_SECONDS` or cannot listen, if a rank does not
                connect within the given seconds, or if a rank runs other versions or other code than rank 0.
        """
        serves = self._launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if serves:
            self._check_own_name()
        else:
            self._reach_rank_0()
        self._waits_for = f"the store at {self._master()}, which accepts connections but does not answer"
        self._store = self._open_store(serves)
        own: dict[str, Any] = {"address": _own_address(*self._target()), "host": self._host}
        own |= {"software": describe_versions(), "cores": describe_cores()}
        self._store.set(f"rendezvous/{self._launch.rank}", json.dumps(own))
        is_first = self._launch.rank == 0
        addresses = self._gather_addresses(self._store) if is_first else self._receive_addresses(self._store)
        self.num_threads = json.loads(self._store.get("rendezvous/threads"))[self._launch.rank]
        # By default gloo takes the address of the host's name, which is 127.0.1.1 on a Debian host, or the loopback.
        if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := self._interface(addresses)):
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        self._waits_for = (
            f"the process group to form: all ranks met at {self._master()} and connect to each other, at any port, "
            f"over GLOO_SOCKET_IFNAME={os.environ.get('GLOO_SOCKET_IFNAME')} or NCCL's choice"
        )
        self._start = time.monotonic()  # forming the process group has the same time limit

    def explain(self, error: RuntimeError) -> ConfigError:
        """Returns an error that explains a failure to form the process group after the ranks have met."""
        return ConfigError(
            f"host {self._host}: the ranks met at {self._master()}, but could not all connect to each other: "
            f"{str(error).splitlines()[0]}. Every rank must reach every other one at any port, over the interface that "
            f"GLOO_SOCKET_IFNAME ({os.environ.get('GLOO_SOCKET_IFNAME', 'not set')} here) and NCCL_SOCKET_IFNAME name: "
            "set them to the cluster's, and open its firewall between the hosts. If another rank ended, see its line."
        )

    def _master(self) -> str:
        return f"MASTER_ADDR={self._launch.master_addr}, MASTER_PORT={self._launch.master_port}"

    def _check_own_name(self) -> None:
        try:
            _own_address(*self._target())
        except OSError as error:
            raise ConfigError(
                f"rank 0 on host {self._host} does not know its own name, {self._master()}: {error.strerror or error}. "
                f"{_WAYS_OUT}"
            ) from None

    def _reach_rank_0(self) -> None:
        silent_since = time.monotonic()
        while True:
            try:
                socket.create_connection(self._target(), timeout=_GRACE_SECONDS / 2).close()
                return
            except ConnectionRefusedError:
                silent_since = time.monotonic()
                reason = "its host answers, but no rank 0 listens there yet" + self._hint_at_loopback()
            except OSError as error:
                reason = f"{error.strerror or error}"
            self._waits_for = f"rank 0 at {self._master()}: {reason}"
            now = time.monotonic()
            if now - silent_since >= min(SILENCE_SECONDS, self._seconds) or now - self._start >= self._seconds:
                raise ConfigError(
                    f"host {self._host} cannot reach rank 0 at {self._master()}: {reason} ({now - self._start:.0f} s). "
                    f"If rank 0 or its host ended, see its line; else: {_WAYS_OUT}"
                )
            time.sleep(_POLL_SECONDS)

    def _open_store(self, serves: bool) -> dist.TCPStore:
        try:
            return dist.TCPStore(
                *self._target(),
                is_master=serves,
                wait_for_workers=False,
                multi_tenant=True,  # torch opens another store at the same port: they share the server
                timeout=timedelta(seconds=self._seconds),
            )
        except dist.DistNetworkError as error:
            if f"code: -{errno.EADDRINUSE}" not in str(error):
                raise ConfigError(f"host {self._host}: no store at {self._master()}: {error}. {_WAYS_OUT}") from None
            raise ConfigError(
                f"rank 0 cannot listen on host {self._host}: port {self._launch.master_port} is in use, by another run "
                f"or program. {_WAYS_OUT}"
            ) from None

    def _gather_addresses(self, store: dist.TCPStore) -> list[str]:
        """Runs on rank 0: waits for all ranks, and sends them all addresses, or an error if a rank is missing."""
        size = self._launch.world_size
        missing = list(range(size))
        while missing := [rank for rank in missing if not store.check([f"rendezvous/{rank}"])]:
            self._waits_for = f"{join_ranks(missing)} of {size} to come to {self._master()}"
            if time.monotonic() - self._start >= self._seconds:
                self._refuse(
                    store,
                    f"{join_ranks(missing)} of {size} did not come within {self._seconds:.0f} s to {self._master()}. A "
                    "line of theirs may say why; or a host is down, unreachable, or slower to open its files than "
                    "parallel.timeout_seconds allows.",
                )
            time.sleep(_POLL_SECONDS / 5)
        self._waits_for = None
        ranks = [json.loads(store.get(f"rendezvous/{rank}")) for rank in range(size)]
        if differences := find_differences(ranks):
            self._refuse(store, differences)
        addresses = [rank["address"] for rank in ranks]
        threads = divide_cores([(rank["host"], rank["cores"]) for rank in ranks])
        store.set("rendezvous/threads", json.dumps(threads))
        store.set("rendezvous/addresses", " ".join(addresses))
        store.set("rendezvous/error", "")
        return addresses

    def _refuse(self, store: dist.TCPStore, error: str) -> NoReturn:
        """Sends all ranks the reason why they cannot meet, and raises it."""
        store.set("rendezvous/error", error)
        time.sleep(min(_GRACE_SECONDS, self._seconds) / 5)  # the store ends with this rank
        raise ConfigError(error)

    def _receive_addresses(self, store: dist.TCPStore) -> list[str]:
        """Runs on the other ranks: waits for rank 0 and returns the addresses that it sends."""
        self._waits_for = None  # rank 0 prints which ranks are missing
        try:
            store.wait(["rendezvous/error"], timedelta(seconds=self._seconds + _GRACE_SECONDS))
            error = store.get("rendezvous/error").decode()
            addresses = [] if error else store.get("rendezvous/addresses").decode().split()
        except (RuntimeError, dist.DistError):
            raise ConfigError(
                f"host {self._host}: rank 0 at {self._master()} ended, or lost contact, before all ranks had met. "
                "Its own line says why."
            ) from None
        if error:
            raise ConfigError(error)
        return addresses

    def _target(self) -> tuple[str, int]:
        assert self._launch.master_addr is not None
        return self._launch.master_addr, self._launch.master_port

    def _hint_at_loopback(self) -> str:
        if _is_loopback(_own_address(*self._target())):
            return f"; {self._launch.master_addr} is this host itself, which is wrong if rank 0 runs on another"
        return ""

    def _interface(self, addresses: list[str]) -> str | None:
        """Returns the network interface towards rank 0's host, or on that host, towards the other hosts."""
        own = _own_address(*self._target())
        others = [address for address in addresses if not _is_loopback(address)]
        if _is_loopback(own) and others:
            own = _own_address(others[0], self._launch.master_port)
        for name, found in psutil.net_if_addrs().items():
            if own in (entry.address.partition("%")[0] for entry in found):
                return name
        return None

    def _watch(self) -> None:
        limit = self._seconds + 2 * _GRACE_SECONDS
        waited = 0.0
        while not self._over.wait(min(NOTICE_SECONDS, limit - waited)):
            waited = time.monotonic() - self._start
            if waited >= limit:
                line = f"error on rank {self._launch.rank}: host {self._host} has waited {waited:.0f} s for "
                print(f"{line}{self._waits_for or 'rank 0'}. The run ends.", file=sys.stderr, flush=True)
                self._end(2)
                return
            if self._waits_for is not None:
                line = f"rank {self._launch.rank} (host {self._host}) has waited {waited:.0f} s for {self._waits_for}"
                print(line, file=sys.stderr, flush=True)


def find_differences(ranks: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns an error message about ranks whose software differs from rank 0's; None if nothing differs.

    Args:
        ranks: per rank, its "host" and its "software", which maps the name of each package to its version.
    """
    first, sentences = ranks[0], []
    for name, expected in first["software"].items():
        other: dict[tuple[str, str], list[int]] = {}
        for number, rank in enumerate(ranks):
            if rank["software"][name] != expected:
                other.setdefault((rank["host"], rank["software"][name]), []).append(number)
        what = "the project's code in another state" if name == "code" else name
        sentences += [
            f"{join_ranks(numbers)} (host {host}) {'has' if len(numbers) == 1 else 'have'} {what} "
            f"{'(' + found + ')' if name == 'code' else found}, rank 0 (host {first['host']}) has {expected}"
            for (host, found), numbers in other.items()
        ]
    if not sentences:
        return None
    more = f"; and {len(sentences) - _LISTED} more" if len(sentences) > _LISTED else ""
    return (
        f"{'; '.join(sentences[:_LISTED])}{more}. All ranks must run the same software: install the same there, or "
        "share the environment. 'beit3 check-cluster HOSTFILE' names what differs on every host before a run."
    )


def _own_address(host: str, port: int) -> str:
    """Returns this host's address on the network towards another host; sends nothing."""
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return probe.getsockname()[0].partition("%")[0]


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
