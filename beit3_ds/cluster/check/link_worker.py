"""Measures network speed with torch.distributed: first between pairs of nodes, then between all nodes.

One process of this program runs on each node. The source text of this module is sent to the node over ssh, so the
module must not import beit3_ds. The process ends when its standard input closes.
"""

import json
import os
import queue
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

MARK = "beit3-probe "
"""Prefix of every line that is an answer; equal to `probe.MARK`."""
_TIMEOUT = timedelta(seconds=60)
_MIN_BYTES, _BUFFER_BYTES, _MAX_BYTES = 1 << 16, 1 << 25, 1 << 28
_GROWTH = 8
_ENOUGH_SECONDS = 0.1  # minimum seconds of a transfer, so that latency and TCP's slow start matter little
_ALL_REDUCE_SECONDS = 0.5
_TRIES = 2  # the fastest try counts, because other traffic and busy cores only slow transfers


def pair_rounds(size: int) -> list[list[tuple[int, int]]]:
    """Returns the rounds of a round-robin tournament between nodes. In a round, each node is in at most one pair.

    Each pair of nodes occurs in exactly one round. An even `size` gives `size - 1` rounds. An odd `size` gives `size`
    rounds, each with one idle node.
    """
    players = list(range(size + size % 2))
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        rounds.append([(min(pair), max(pair)) for pair in pairs if max(pair) < size])
        players = [players[0], players[-1], *players[1:-1]]
    return rounds


class Worker:
    """Measures the network speed from this rank to other ranks."""

    def __init__(
        self, rank: int, world_size: int, address: str, port: int, backend: str, store_text: str, secret: str
    ) -> None:
        """Joins the process group of all nodes. Rank 0 listens at `address` and at no other address.

        Args:
            rank: rank of this node.
            world_size: number of nodes.
            address: address of node 0.
            port: port on node 0.
            backend: "nccl", which sends from the first GPU, or "gloo".
            store_text: source text of `runtime/keyed_store.py`; this node may lack the file.
            secret: shared secret in hexadecimal, with which ranks sign the addresses that they tell each other.
        """
        import torch
        import torch.distributed as dist

        self._torch, self._dist, self._rank, self._size = torch, dist, rank, world_size
        self._device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
        if backend == "nccl":
            torch.cuda.set_device(0)
        module: dict[str, Any] = {"__name__": "keyed_store"}
        exec(compile(store_text, "keyed_store", "exec"), module)
        listener = _bind(address, port) if rank == 0 else None
        store = dist.TCPStore(
            address,
            port,
            is_master=listener is not None,
            wait_for_workers=False,
            timeout=_TIMEOUT,
            master_listen_fd=None if listener is None else listener.detach(),
        )
        # This attribute keeps the Python object alive: torch calls its methods, but keeps only the C++ part of it.
        self._store = module["KeyedStore"](store, bytes.fromhex(secret))
        dist.init_process_group(backend, store=self._store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
        self._buffer = torch.zeros(_BUFFER_BYTES, dtype=torch.uint8, device=self._device)

    def measure(self, rounds: list[list[list[int]]]) -> dict[str, float]:
        """Measures the speed from this rank to every other rank.

        Args:
            rounds: rounds of disjoint pairs of ranks (`pair_rounds`). All ranks must pass the same rounds.

        Returns:
            Bits per second from this rank to every other rank. The keys are rank numbers as strings.
        """
        rates: dict[str, float] = {}
        for pairs in rounds:
            self._dist.barrier()
            for first, second in pairs:
                if self._rank == first:
                    rates[str(second)] = self._send_to(second)
                    self._receive_from(second)
                elif self._rank == second:
                    self._receive_from(first)
                    rates[str(first)] = self._send_to(first)
        return rates

    def all_reduce(self, slowest: float) -> float:
        """Measures an all-reduce over all nodes and returns the bus bandwidth in bits per second.

        Bus bandwidth counts the data that crosses each link of a ring of n ranks: 2 (n - 1) / n times the tensor's
        size.

        Args:
            slowest: bits per second of the slowest link. The size of the tensor is computed from this speed.
        """
        numel = int(min(max(slowest / 8 * _ALL_REDUCE_SECONDS, _MIN_BYTES), _BUFFER_BYTES)) // 4
        tensor = self._torch.zeros(numel, dtype=self._torch.float32, device=self._device)
        times = []
        for _ in range(_TRIES + 1):  # the first one also connects the ranks
            self._dist.barrier()
            begin = self._now()
            self._dist.all_reduce(tensor)
            times.append(self._now() - begin)
        return 8 * 4 * numel * 2 * (self._size - 1) / self._size / min(times)

    def _send_to(self, other: int) -> float:
        """Sends ever larger messages until a message takes long enough to be timed; returns bits per second."""
        best = 0.0
        size = _MIN_BYTES
        tries = 0
        while tries < _TRIES:
            self._pass_number(size, other)
            begin = self._now()
            for part in self._parts(size):
                self._dist.send(part, other)
            self._receive_number(other)
            seconds = self._now() - begin
            if seconds >= _ENOUGH_SECONDS or size == _MAX_BYTES:
                best = max(best, 8 * size / seconds)
                tries += 1
            else:
                size = min(size * _GROWTH, _MAX_BYTES)
        self._pass_number(0, other)
        return best

    def _receive_from(self, other: int) -> None:
        while size := self._receive_number(other):
            for part in self._parts(size):
                self._dist.recv(part, other)
            self._pass_number(size, other)

    def _parts(self, size: int) -> list[Any]:
        return [self._buffer[:size]] if size <= _BUFFER_BYTES else [self._buffer] * (size // _BUFFER_BYTES)

    def _pass_number(self, number: int, other: int) -> None:
        self._dist.send(self._torch.tensor([number], device=self._device), other)

    def _receive_number(self, other: int) -> int:
        number = self._torch.zeros(1, dtype=self._torch.int64, device=self._device)
        self._dist.recv(number, other)
        return int(number.item())  # waits for the device

    def _now(self) -> float:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()
        return time.monotonic()


def _bind(address: str, port: int) -> socket.socket:
    """Returns a socket that is bound to one address only, for torch's store. torch's own socket would listen at all
    addresses.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    return listener


def _answer_all(requests: "queue.Queue[bytes]") -> None:
    worker: Worker | None = None
    while True:
        request = json.loads(requests.get())
        question = request.pop("ask")
        answer: dict[str, Any] = {"answer": None}
        try:
            if question == "join":
                worker = Worker(**request)
            else:
                answer["answer"] = getattr(worker, question)(**request)
        except Exception as error:  # sent to the asking process, which adds this host's name
            answer = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        print(MARK + json.dumps(answer), flush=True)


def main() -> None:
    """Answers requests from standard input. The process ends when standard input closes, even during a measurement."""
    requests: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_answer_all, args=(requests,), daemon=True).start()
    for line in sys.stdin.buffer:
        requests.put(line)
    os._exit(0)  # threads of torch may wait for peers that are gone


if __name__ == "__main__":
    main()
