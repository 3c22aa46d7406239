"""Tests the watchdog with ranks that stop, stall, leave or fail; each is a process that runs no training."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.config import ParallelConfig
from beit3_ds.parallel.activity import Activity

NUM_RANKS = 3
HEARTBEAT_SECONDS = 3  # much longer than a busy machine keeps a thread from running
LONG = 1000


def run_rank(rank: int, port: int, folder: str, config: ParallelConfig, main: Callable[[int, Activity], None]) -> None:
    from beit3_ds.runtime.process_group import joined_ranks

    log = os.open(f"{folder}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_RANKS, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    with joined_ranks(config, folder) as mesh:
        print("watched", flush=True)
        main(rank, mesh.activity)


class Ranks:
    """Holds the processes of all ranks and their outputs."""

    def __init__(self, folder: Path, processes: list[Any]) -> None:
        self.folder, self.processes = folder, processes

    def output(self, rank: int) -> str:
        path = self.folder / f"rank{rank}.log"
        return path.read_text() if path.exists() else ""

    def wait_for(self, text: str, ranks: range = range(NUM_RANKS)) -> None:
        deadline = time.monotonic() + 60
        while not all(text in self.output(rank) for rank in ranks):
            assert time.monotonic() < deadline, [self.output(rank) for rank in range(NUM_RANKS)]
            time.sleep(0.05)

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)

    def statuses(self, *ranks: int) -> list[int | None]:
        """Returns the exit statuses of ranks, which must end in time."""
        for rank in ranks:
            self.processes[rank].join(60)
        return [self.processes[rank].exitcode for rank in ranks]

    def error(self, rank: int) -> str:
        """Returns the error line of a rank; fails if the rank printed more than one."""
        (line,) = (line for line in self.output(rank).splitlines() if line.startswith("error on"))
        return line


@contextmanager
def started(folder: Path, main: Callable[[int, Activity], None], **parallel: int) -> Iterator[Ranks]:
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = ParallelConfig(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **parallel)
    arguments = (port, str(folder), config, main)
    ranks = Ranks(folder, [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(NUM_RANKS)])
    for process in ranks.processes:
        process.start()
    try:
        ranks.wait_for("watched")
        yield ranks
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()


def wait_in_collective(rank: int, activity: Activity) -> None:
    """Waits at a barrier that the last rank never reaches."""
    import torch.distributed as dist

    if rank == NUM_RANKS - 1:
        time.sleep(LONG)
    dist.barrier()


@pytest.mark.parametrize("lost", [pytest.param(1, marks=pytest.mark.slow), pytest.param(0, id="the store's")])
def test_stopped_rank_is_found_by_its_heartbeat(tmp_path: Path, lost: int) -> None:
    """Checks that a stopped rank is found long before a collective times out.

    Requests to a stopped rank's store would wait forever.
    """
    with started(tmp_path, wait_in_collective) as ranks:
        ranks.signal(signal.SIGSTOP, lost)
        others = [rank for rank in range(NUM_RANKS) if rank != lost]
        assert ranks.statuses(*others) == [1, 1]
        for rank in others:
            assert f": rank {lost} (stage 0, data-parallel rank {lost}, " in ranks.error(rank)
            assert "does not answer" in ranks.error(rank)


def forge_a_verdict(rank: int, activity: Activity) -> None:
    """Writes the end of the run into the store without the secret, as an attacker on the network could."""
    import torch.distributed as dist

    if rank == NUM_RANKS - 1:
        store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
        (key,) = (key for key in store.list_keys() if key.endswith("watchdog/failure"))
        store.set(key, json.dumps(["rank 0 has nothing left to do"]))
    time.sleep(LONG)


def test_forged_verdict_is_not_believed(tmp_path: Path) -> None:
    """Checks that the ranks end and report the forgery, but do not print the forged text."""
    with started(tmp_path, forge_a_verdict) as ranks:
        assert ranks.statuses(0, 1, 2) == [1, 1, 1]
        for rank in range(NUM_RANKS):
            assert "holds a value of 'failure' that no rank of this run wrote" in ranks.output(rank)
            assert "nothing left to do" not in ranks.output(rank)


def stall(rank: int, activity: Activity) -> None:
    import torch.distributed as dist

    activity.begin("reading data", 12)
    if rank == 1:
        read_for_ever()
    dist.barrier()


def read_for_ever() -> None:
    time.sleep(LONG)


def test_stalled_rank_is_slow_first(tmp_path: Path) -> None:
    """Checks that only the rank that does not wait counts as stalled, and that each rank prints its own stack."""
    with started(tmp_path, stall, timeout_seconds=3 * HEARTBEAT_SECONDS) as ranks:
        ranks.wait_for("slow: rank 1 (", range(1))
        assert all(process.is_alive() for process in ranks.processes)
        assert ranks.statuses(0, 1, 2) == [1, 1, 1]
        place = (
            r"rank 1 \(stage 0, data-parallel rank 1, tensor-parallel rank 0, host [^)]+\) is in step 12, reading data"
        )
        (slow, *_) = re.findall(rf"slow: {place}, for (\d+) s; 2 ranks wait for it", ranks.output(0))
        assert HEARTBEAT_SECONDS <= int(slow) < 3 * HEARTBEAT_SECONDS
        for rank in range(NUM_RANKS):
            assert re.search(rf"stalled: {place}, for \d+ s; 2 ranks wait for it", ranks.error(rank))
            where = "read_for_ever" if rank == 1 else "barrier"
            assert f"in {where}\n" in ranks.output(rank).split("stacks of rank")[1], ranks.output(rank)


def come_late(rank: int, activity: Activity) -> None:
    """Ends the first rank at once, and the last one long after the others."""
    for _ in range(rank * HEARTBEAT_SECONDS):
        time.sleep(1)


@pytest.mark.slow
def test_a_job_that_was_suspended_goes_on(tmp_path: Path) -> None:
    """Checks that no rank counts as lost if all were suspended, as by `scontrol suspend`, or if one has ended."""
    with started(tmp_path, come_late) as ranks:
        ranks.signal(signal.SIGSTOP, *range(NUM_RANKS))
        time.sleep(2 * HEARTBEAT_SECONDS)
        ranks.signal(signal.SIGCONT, *range(NUM_RANKS))
        assert ranks.statuses(0, 1, 2) == [0, 0, 0], [ranks.output(rank) for rank in range(NUM_RANKS)]


def fail(rank: int, activity: Activity) -> None:
    import torch.distributed as dist

    if rank == 2:
        raise OSError("no space\nsecond line")
    dist.barrier()


def test_failing_rank_is_named_at_once(tmp_path: Path) -> None:
    with started(tmp_path, fail) as ranks:
        assert ranks.statuses(0, 1, 2) == [1, 1, 1]
        for rank in (0, 1):
            line = ranks.error(rank)
            assert ": rank 2 (stage 0, " in line and line.endswith(" failed: OSError: no space. The run ends.")


def lose_contact(rank: int, activity: Activity) -> None:
    import torch.distributed as dist

    if rank == 1:
        raise RuntimeError("gloo: Connection closed by peer [192.0.2.7]:555")  # an address of no rank
    dist.barrier()


def test_the_line_of_a_lost_contact_names_what_the_rank_lost(tmp_path: Path) -> None:
    with started(tmp_path, lose_contact) as ranks:
        assert ranks.statuses(0, 1, 2) == [1, 1, 1]
        assert ": ranks lost contact or waited longer" in ranks.error(1)
        assert ranks.error(1).endswith(
            "On this rank a collective failed: RuntimeError: gloo: Connection closed by peer [192.0.2.7]:555. "
            "The run ends."
        )
        assert all("192.0.2.7" not in ranks.error(rank) for rank in (0, 2))
