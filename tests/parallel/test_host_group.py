"""Values of hosts between ranks: what arrives is what was sent, on every number of ranks, and nothing is pickled."""

import pickle
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Size, Tensor

from beit3_ds.parallel import HostGroup, build_host_group
from beit3_ds.parallel.host_value import as_bytes, pack, unpack, unpack_tensors
from tests.ranks import run_ranks

DTYPES = (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.float64)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    seed = draw(st.integers(0, 9))
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 5
    values = values.to(draw(st.sampled_from(DTYPES)))
    if values.dim() and draw(st.booleans()):
        values = values[..., ::2]  # what has one element or none counts as contiguous, whatever its stride
    return values.T if values.dim() == 2 and draw(st.booleans()) else values


# Surrogates stand for the bytes of a file's name that are not UTF-8.
texts = st.text(st.characters(), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | tensors() | st.just(Size([2, 3])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(texts, inner, max_size=4)
    ),
    max_leaves=12,
)


def equal(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second) or first != first


@given(values)
@settings(max_examples=200, deadline=None)
def test_values_come_back_as_they_were(value: Any) -> None:
    """Catches tuples and sizes that become lists, and tensors that lose their type or order, or have odd strides."""
    header, tensors = pack(value)
    arriving = unpack_tensors(header)
    for target, source in zip(arriving, tensors, strict=True):
        as_bytes(target).copy_(as_bytes(source))
    assert equal(unpack(header, arriving), value)


class Named(tuple):
    """A tuple that would lose its type."""


@pytest.mark.parametrize(
    "value", [Named((1,)), {1: 2}, {"set": {1}}, [object()], b"bytes", torch.empty(1, device="meta")]
)
def test_what_would_change_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        pack(value)


def exchange(sizes: Sequence[int]) -> list[str]:
    """Runs every operation over the first ranks, for each group size."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("pickled")

    pickle.loads = pickle.load = pickle.Unpickler = refuse  # type: ignore[assignment,misc]
    dist.init_process_group("gloo")
    everyone, wrong = build_host_group(timedelta(seconds=60)), []
    for size in sizes:
        if everyone.rank >= size:
            continue
        host = everyone.among(reversed(range(size)))  # numbered in another order than torch's
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
        for source in range(size):
            sent = {
                "names": ["\udc80 name"] * 100 * source,
                "size": Size([source]),
                "x": torch.full((source, 2), source),
            }
            results[f"broadcast from {source}"] = (host.broadcast(sent if rank == source else None, source), sent)
        host.barrier()
        wrong += [f"{what} of {size} on {rank}: {pair}" for what, pair in results.items() if not equal(*pair)]
    everyone.barrier()
    dist.destroy_process_group()
    return wrong


def test_ranks_exchange_values() -> None:
    """Catches a mistake in trees with holes, which sizes that are no power of two have."""
    assert run_ranks(exchange, 6, [1, 2, 3, 4, 5, 6]) == [[]] * 6


def test_a_process_alone_sends_nothing() -> None:
    host, value = HostGroup(), {"x": torch.ones(2)}
    host.barrier()
    assert (host.size, host.gather(value), host.collect(value), host.broadcast(value)) == (1, [value], [value], value)
    total = host.sum(value["x"])
    assert torch.equal(total, value["x"]) and total is not value["x"]
