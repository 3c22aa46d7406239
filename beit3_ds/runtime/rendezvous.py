"""Connects the ranks before a process group exists, and reports ranks that are late or unreachable."""

import errno
import hmac
import json
import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from beit3_ds.config import ConfigError
from beit3_ds.cores import describe_cores, divide_cores
from beit3_ds.rank_names import join_ranks
from beit3_ds.runtime.addresses import find_interface, find_meeting_address, is_loopback, source_address
from beit3_ds.runtime.keyed_store import ForgedValueError, KeyedStore
from beit3_ds.runtime.launch_environment import TORCH_LAUNCHER, Launch
from beit3_ds.runtime.run_secret import SECRET_VARIABLE
from beit3_ds.runtime.stop_deadline import STOP_SECONDS
from beit3_ds.runtime.versions import describe_versions

SILENCE_SECONDS = 60.0
"""Seconds without an answer from rank 0's host after which a rank gives up. A refused connection counts as an answer.
"""
NOTICE_SECONDS = 30.0
"""Seconds between two messages that a waiting rank prints."""
_POLL_SECONDS = 0.5
_CONTENDER_SECONDS = STOP_SECONDS + 5.0  # time in which a launcher ends its other ranks after one rank has ended
_LAUNCHER_SECONDS = 60.0  # time in which rank 0 ignores ranks of another launcher on its host
_GRACE_SECONDS = 10.0  # time for other ranks to read rank 0's error message, or to fail by themselves
_LISTED = 8  # maximum number of differences in a message
_WAYS_OUT = (
    "Name an address of rank 0's host that all others reach, and a port that is free there: deepspeed --master_addr A "
    "--master_port P; mpirun -x MASTER_ADDR=A -x MASTER_PORT=P; export MASTER_ADDR=A MASTER_PORT=P before srun."
)


class Rendezvous:
    """Connects a starting rank to all other ranks, and prints which ranks are missing.

    Ranks meet in rank 0's store. Each rank writes its address and software versions there. A separate thread prints
    what this rank waits for, and ends the process if a call of torch blocks for too long.
    """

    def __init__(
        self,
        launch: Launch,
        seconds: float,
        secret: bytes,
        end: Callable[[int], None] = os._exit,
        contended_at: Callable[[], float] = lambda: -math.inf,
    ) -> None:
        """Prepares the rendezvous. `meet` opens the first connection.

        Args:
            launch: rank of this process, and the address of rank 0.
            seconds: maximum time in seconds that ranks wait for each other.
            secret: secret that all ranks of the run share.
            end: function that ends this process at once, even if the main thread is blocked in a call.
            contended_at: function that returns the monotonic time in seconds at which another command was last seen
                waiting for the lock on the output folder; -inf if never. Only rank 0 calls the function. The other
                command uses the same secret and port, so its ranks may connect to this rank 0. If the other command was
                seen, rank 0 waits until it was last seen `_CONTENDER_SECONDS` ago, and then collects the ranks again.
        """
        self._launch, self._seconds, self._end, self._contended_at = launch, seconds, end, contended_at
        self._host = socket.gethostname()
        self._waits_for: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rendezvous", daemon=True)
        self._secret, self._key = secret, b""
        self._nonce = secrets.token_hex(16)
        self._address = ""
        # One launcher process of torch starts all ranks of a host. With `beit3 launch`, which names a secret, each rank
        # has a guard process of its own as its parent.
        self._parent = os.getppid() if launch.launcher == TORCH_LAUNCHER and launch.secret_file is None else 0
        self.num_threads = 1
        """Number of threads that this rank should use: an equal share of the host's cores. Valid after `meet`."""

    def __enter__(self) -> "Rendezvous":
        self._start = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def meet(self) -> None:
        """Waits until all ranks have connected, and chooses gloo's network interface.

        Sends a few hundred bytes per rank.

        Raises:
            ConfigError: if rank 0's host does not answer for `SILENCE_SECONDS`; if rank 0 cannot listen or ends; if a
                rank does not connect in time; or if a rank's secret, software or code differs from rank 0's.
        """
        serves = self._launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._address = self._find_address()
        if not serves:
            self._reach_rank_0()
        self._waits_for = f"the store at {self._master()}, which accepts connections but does not answer"
        base = self._serve() if serves else self._connect(self._seconds)
        own: dict[str, Any] = {"address": source_address(*self._target()), "host": self._host, "nonce": self._nonce}
        own |= {"software": describe_versions(), "cores": describe_cores(), "parent": self._parent}
        answer = self._gather_ranks(base, own) if self._launch.rank == 0 else self._receive_answer(base, own)
        self.num_threads, addresses = answer["threads"][self._launch.rank], answer["addresses"]
        self._key = self._derive_key("session", *answer["nonces"])
        self.store = KeyedStore(base, self._key)
        # By default gloo takes the address of the host's name, which is 127.0.1.1 on a Debian host, or the loopback.
        if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := self._interface(addresses)):
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        self._waits_for = (
            f"the process group to form: all ranks met at {self._master()} and connect to each other, at any port, "
            f"over GLOO_SOCKET_IFNAME={os.environ.get('GLOO_SOCKET_IFNAME')} or NCCL's choice"
        )
        self._start = time.monotonic()  # forming the process group has the same time limit

    def explain(self, error: RuntimeError) -> ConfigError:
        """Returns an error for the case that the ranks met, but could not form the process group."""
        if isinstance(error, ForgedValueError):
            return ConfigError(f"host {self._host}: {error}")
        return ConfigError(
            f"host {self._host}: the ranks met at {self._master()}, but could not all connect to each other: "
            f"{str(error).splitlines()[0]}. Every rank must reach every other one at any port, over the interface that "
            f"GLOO_SOCKET_IFNAME ({os.environ.get('GLOO_SOCKET_IFNAME', 'not set')} here) and NCCL_SOCKET_IFNAME name: "
            "set them to the cluster's, and open its firewall between the hosts. If another rank ended, see its line."
        )

    def _master(self) -> str:
        return f"MASTER_ADDR={self._launch.master_addr}, MASTER_PORT={self._launch.master_port}"

    def _find_address(self) -> str:
        """Returns the address of rank 0's host."""
        assert self._launch.master_addr is not None
        try:
            return find_meeting_address(self._launch)
        except OSError as error:
            if self._launch.rank != 0:
                return self._launch.master_addr  # `meet` reports why it cannot connect
            raise ConfigError(
                f"rank 0 on host {self._host} cannot resolve its own address, {self._master()}: "
                f"{error.strerror or error}. {_WAYS_OUT}"
            ) from None

    def _reach_rank_0(self) -> None:
        silent_since = time.monotonic()
        while True:
            try:
                socket.create_connection((self._address, self._launch.master_port), timeout=_GRACE_SECONDS / 2).close()
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

    def connect(self, seconds: float) -> dist.Store:
        """Opens another connection to rank 0's store. The connection has its own prefix for keys. Call `meet` first.

        Args:
            seconds: time limit in seconds for each request to the store.
        """
        return KeyedStore(dist.PrefixStore("watchdog", self._connect(seconds)), self._key)

    def _serve(self) -> dist.Store:
        """Opens rank 0's store at rank 0's address only. By default, torch would listen at all addresses."""
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self._address, self._launch.master_port))
            return self._connect(self._seconds, listener)
        except (OSError, dist.DistNetworkError) as error:
            listener.close()
            if getattr(error, "errno", None) != errno.EADDRINUSE and f"code: -{errno.EADDRINUSE}" not in str(error):
                raise ConfigError(f"host {self._host}: no store at {self._master()}: {error}. {_WAYS_OUT}") from None
            raise ConfigError(
                f"rank 0 cannot listen on host {self._host}: port {self._launch.master_port} is in use, by another run "
                f"or program. {_WAYS_OUT}"
            ) from None

    def _connect(self, seconds: float, listener: socket.socket | None = None) -> dist.Store:
        try:
            store = dist.TCPStore(
                self._address,
                self._launch.master_port,
                is_master=listener is not None,
                wait_for_workers=False,
                timeout=timedelta(seconds=seconds),
                master_listen_fd=None if listener is None else listener.detach(),
            )
        except dist.DistNetworkError as error:
            if listener is not None:
                raise
            raise ConfigError(f"host {self._host}: no store at {self._master()}: {error}. {_WAYS_OUT}") from None
        # torchrun's agents keep one store for all restarts.
        return dist.PrefixStore(f"run/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def _derive_key(self, *words: str) -> bytes:
        return hmac.digest(self._secret, " ".join(words).encode(), "sha256")

    def _gather_ranks(self, base: dist.Store, own: Mapping[str, Any]) -> dict[str, Any]:
        """Waits for all ranks, sends an answer to them, and returns the answer. Only rank 0 calls this method.

        The answer has each rank's address, nonce and number of threads. It also has rank 0's challenge (`_find_ranks`).

        A user may start a second command for the same output folder. This command is refused, but until then, its ranks
        may connect to rank 0 of this run. In this case, rank 0 waits until the second command has ended, and collects
        the ranks of its own run again.

        Raises:
            ConfigError: if a rank does not connect in time, or its software differs from rank 0's. The other ranks
                receive the error message.
        """
        while True:
            began = time.monotonic()
            challenge, store, ranks = self._find_ranks(base, own)
            if self._contended_at() < began - _CONTENDER_SECONDS:
                break
            self._waits_for = "another start in the same output folder, which is refused, to end"
            while time.monotonic() - self._contended_at() <= _CONTENDER_SECONDS:
                time.sleep(_POLL_SECONDS)
        if differences := find_differences(ranks):
            self._refuse(store, differences)
        threads = divide_cores([(rank["host"], rank["cores"]) for rank in ranks])
        answer = {"addresses": [rank["address"] for rank in ranks], "threads": threads}
        answer["nonces"] = [challenge, *(rank["nonce"] for rank in ranks)]
        store.set("answer", json.dumps(answer))
        return answer

    def _find_ranks(self, base: dist.Store, own: Mapping[str, Any]) -> tuple[str, KeyedStore, list[dict[str, Any]]]:
        """Waits for all ranks. Returns a random challenge, a store, and a description of each rank.

        The store signs values with a key that is derived from the ranks' secret and the challenge. Ranks sign their
        descriptions with this key. So descriptions of an earlier run are invalid.
        """
        challenge, size = secrets.token_hex(16), self._launch.world_size
        invitation = KeyedStore(base, self._secret)
        store = KeyedStore(base, self._derive_key("challenge", challenge))
        found: dict[int, dict[str, Any]] = {0: dict(own)}
        while len(found) < size:
            invitation.set("challenge", challenge)
            for rank in range(size):
                if rank not in found and (text := _read(store, f"rank/{rank}")) is not None:
                    description = json.loads(text)
                    if not self._is_of_another_launcher(description):
                        found[rank] = description
            missing = [rank for rank in range(size) if rank not in found]
            if missing and time.monotonic() - self._start >= self._seconds:
                self._refuse(
                    store,
                    f"{join_ranks(missing)} of {size} did not come within {self._seconds:.0f} s to {self._master()}. A "
                    "line of theirs may say why; or a host is down, unreachable, or slower to open its files than "
                    "parallel.timeout_seconds allows.",
                )
            if missing:
                self._waits_for = f"{join_ranks(missing)} of {size} to come to {self._master()}"
                time.sleep(_POLL_SECONDS / 5)
        self._waits_for = None
        return challenge, store, [found[rank] for rank in range(size)]

    def _is_of_another_launcher(self, description: Mapping[str, Any]) -> bool:
        """Returns whether rank 0 must ignore the described rank, because another launcher started that rank on rank 0's
        host.

        Ranks of another launcher are ignored only at first: for `_LAUNCHER_SECONDS`, but at most for half of the
        maximum wait. After this time, the result is always False.
        """
        is_late = time.monotonic() - self._start >= min(_LAUNCHER_SECONDS, self._seconds / 2)
        return description["host"] == self._host and description["parent"] != self._parent and not is_late

    def _refuse(self, store: KeyedStore, error: str) -> NoReturn:
        """Sends an error message from rank 0 to the other ranks, and then raises an error with this message.

        Raises:
            ConfigError: always.
        """
        store.set("answer", json.dumps({"error": error}))
        time.sleep(min(_GRACE_SECONDS, self._seconds) / 5)  # the store ends when this rank ends
        raise ConfigError(error)

    def _receive_answer(self, base: dist.Store, own: Mapping[str, Any]) -> dict[str, Any]:
        """Sends this rank's description repeatedly until rank 0 answers; returns the answer. Not called on rank 0."""
        self._waits_for = None  # rank 0 prints which ranks are missing
        invitation, began = KeyedStore(base, self._secret), time.monotonic()
        limit = time.monotonic() + self._seconds + _GRACE_SECONDS
        try:
            while time.monotonic() < limit:
                challenge = _read(invitation, "challenge")
                if challenge is not None:
                    store = KeyedStore(base, self._derive_key("challenge", challenge))
                    store.set(f"rank/{self._launch.rank}", json.dumps(own))
                    answer = json.loads(_read(store, "answer") or "{}")
                    if "error" in answer:
                        raise ConfigError(answer["error"])
                    if self._nonce in answer.get("nonces", ()):
                        return dict(answer)
                elif base.check(["challenge"]) and time.monotonic() - began > min(_GRACE_SECONDS, self._seconds) / 2:
                    raise ConfigError(
                        f"host {self._host}: rank 0 at {self._master()} has another secret than this rank, or a "
                        "program on the network overwrites what rank 0 says. All ranks must read one file: share the "
                        f"output folder, or name a copy with {SECRET_VARIABLE}=FILE. Close the port to all but the "
                        "ranks' hosts."
                    )
                time.sleep(_POLL_SECONDS / 5 * (1 + self._launch.world_size / 64))
        except (RuntimeError, dist.DistError):
            pass
        raise ConfigError(
            f"host {self._host}: rank 0 at {self._master()} ended, or lost contact, before all ranks had met. "
            "Its own line says why."
        )

    def _target(self) -> tuple[str, int]:
        assert self._launch.master_addr is not None
        return self._launch.master_addr, self._launch.master_port

    def _hint_at_loopback(self) -> str:
        if is_loopback(source_address(*self._target())):
            return f"; {self._launch.master_addr} is this host itself, which is wrong if rank 0 runs on another"
        return ""

    def _interface(self, addresses: list[str]) -> str | None:
        """Returns the network interface through which this host reaches the other hosts; None if unknown.

        This is the interface to the master address. If the master address is reached over loopback and there are other
        hosts, this is the interface to one of the other hosts.
        """
        own = source_address(*self._target())
        others = [address for address in addresses if not is_loopback(address)]
        if is_loopback(own) and others:
            own = source_address(others[0], self._launch.master_port)
        return find_interface(own)

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
    """Returns an error message if the software of some ranks differs from rank 0's software; otherwise None.

    Args:
        ranks: description of each rank. "host" is the host name, and "software" maps package names to versions.
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


def _read(store: KeyedStore, key: str) -> str | None:
    """Returns the value of a key; None if the key does not exist or the value's digest is wrong."""
    try:
        return store.get(key).decode() if store.check([key]) else None
    except ForgedValueError:
        return None
