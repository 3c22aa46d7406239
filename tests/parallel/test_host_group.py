"""Tests that host values arrive unchanged for every number of ranks, without pickling."""

import pickle
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Size

from beit3_ds.parallel import HostGroup, build_host_group
from tests.parallel.test_host_value import equal
from tests.ranks import run_ranks


def exchange(sizes: Sequence[int]) -> list[str]:
    """Runs every operation in groups of the first ranks, for each group size; returns the errors."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("pickled")

    pickle.loads = pickle.load = pickle.Unpickler = refuse  # type: ignore[assignment,misc]
    dist.init_process_group("gloo")
    everyone, wrong = build_host_group(timedelta(seconds=60)), []
    for size in sizes:
        if everyone.rank >= size:
            continue
        host = everyone.among(reversed(range(size)))  # in another order than torch's ranks
        rank = size - 1 - everyone.rank
        own = {"rank": rank, "names": ["\udc80 name"] * 100 * rank, "tensor": torch.full((rank, 2), rank)}
        total = host.sum(torch.tensor([[10.0**rank]], dtype=torch.float64))
        results = {
            "rank": (host.rank, rank),
            "sum": (total, torch.tensor([[sum(10.0**other for other in range(size))]], dtype=torch.float64)),
            "empty sum": (host.sum(torch.empty(0)), torch.empty(0)),
            "gather": ([found["rank"] for found in host.gather(own)], list(range(size))),
            "collect": (host.collect(rank), list(range(size)) if rank == 0 else None),
        }
        for src in range(size):
            sent = {
                "names": ["\udc80 name"] * 100 * src,
                "size": Size([src]),
                "x": torch.full((src, 2), src),
            }
            results[f"broadcast from {src}"] = (host.broadcast(sent if rank == src else None, src), sent)
        host.barrier()
        wrong += [f"{what} of {size} on {rank}: {pair}" for what, pair in results.items() if not equal(*pair)]
    everyone.barrier()
    dist.destroy_process_group()
    return wrong


def test_ranks_exchange_values() -> None:
    """Catches mistakes in incomplete trees, which occur if the size is not a power of two."""
    assert run_ranks(exchange, 6, [1, 2, 3, 4, 5, 6]) == [[]] * 6


def test_a_process_alone_sends_nothing() -> None:
    host, value = HostGroup(), {"x": torch.ones(2)}
    host.barrier()
    assert (host.size, host.gather(value), host.collect(value), host.broadcast(value)) == (1, [value], [value], value)
    total = host.sum(value["x"])
    assert torch.equal(total, value["x"]) and total is not value["x"]
