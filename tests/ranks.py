"""Starts ranks for tests, with gloo on loopback and one thread each."""

import os
import pickle
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.preloaded import start_module

_TIMEOUT_SECONDS = 180


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = _TIMEOUT_SECONDS
) -> list[Any]:
    """Runs `function(*arguments)` on `world_size` ranks; returns the results in the order of ranks.

    The environment is that of the `deepspeed` launcher. An exception on a rank is raised here with the rank's
    traceback. Ranks that still run after `timeout` seconds are killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    descriptor, secret = tempfile.mkstemp()  # mode 0600
    os.write(descriptor, b"a secret of the tests")
    os.close(descriptor)
    processes, pipes = [], []
    for rank in range(world_size):
        ours, theirs = Pipe()
        with theirs:
            processes.append(start_module("tests.ranks", [], passed=[theirs.fileno()]))
        pipes.append(ours)
        environment: dict[str, object] = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world_size,
            "MASTER_PORT": port,
        }
        environment |= {"BEIT3_SECRET_FILE": secret}
        ours.send((environment, function, arguments))
    try:
        return _collect(pipes, timeout)
    finally:
        os.unlink(secret)
        for process in processes:
            process.kill()
            process.wait()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    pending = dict(enumerate(pipes))
    while pending:
        ready = wait(pending.values(), timeout=timeout)
        if not ready:
            raise TimeoutError(f"ranks {sorted(pending)} have not finished after {timeout} s")
        for rank in [rank for rank, pipe in pending.items() if pipe in ready]:
            try:
                failure, result = pickle.loads(pending.pop(rank).recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} ended without a result") from None
            if failure:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
            results[rank] = result
    return results


def _run_rank(pipe: Connection) -> None:
    environment, function, arguments = pipe.recv()
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    import torch

    torch.set_num_threads(1)
    try:
        outcome = (None, function(*arguments))
    except BaseException:
        outcome = (traceback.format_exc(), None)
    # Plain pickle: multiprocessing's own shares tensors by handles that die with this process.
    pipe.send_bytes(pickle.dumps(outcome))


if __name__ == "__main__":
    _run_rank(Connection(int(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)
