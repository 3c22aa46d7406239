"""Counts every collective call of c10d in the process groups of a rank."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from beit3_ds.parallel import Mesh

# The argument whose bytes count: the whole tensor, that is what comes out of an all-gather and goes into a
# reduce-scatter.
_KINDS = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "allgather_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "reduce_scatter_": ("reduce-scatter", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "send": ("send", 0),
    "recv_": ("receive", 0),
    "recv_any_source_": ("receive", 0),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 1),
    "alltoall_": ("all-to-all", 1),
    "alltoall_base_": ("all-to-all", 1),
}


class Call(NamedTuple):
    """Describes one collective call of one rank."""

    axis: str
    """Axis of the group: data, tensor, model, pipeline, world or host."""
    kind: str
    num_bytes: int
    dtype: torch.dtype


class CollectiveCounter(TorchDispatchMode):
    """Records every collective call of this thread while it is entered; on a CPU this includes backward passes.

    Calls in groups of one rank move no data and are not recorded. Calls of host groups have the axis `host`.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self._axes = {group.group_name: axis for axis, group in _named_groups(mesh)}
        self.calls: list[Call] = []

    def totals(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Returns the number of calls and bytes, by axis and kind."""
        calls: Counter[tuple[str, str]] = Counter()
        sizes: Counter[tuple[str, str]] = Counter()
        for call in self.calls:
            calls[call.axis, call.kind] += 1
            sizes[call.axis, call.kind] += call.num_bytes
        return {key: (calls[key], sizes[key]) for key in sorted(calls)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._note(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: tuple) -> None:
        if name in ("barrier", "monitored_barrier_"):
            return
        assert name in _KINDS, f"c10d::{name} is not counted"
        kind, index = _KINDS[name]
        (group,) = (
            dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_process_group(a)
        )
        if group.size() == 1:
            return
        tensors = list(_tensors(args[index]))
        dtypes = {tensor.dtype for tensor in tensors}
        (dtype,) = dtypes
        axis = self._axes.get(group.group_name, "unknown")
        self.calls.append(Call(axis, kind, sum(t.numel() * t.element_size() for t in tensors), dtype))


def _is_process_group(script_object: torch.ScriptObject) -> bool:
    return "ProcessGroup" in script_object._type().qualified_name()  # ReduceOp travels as an object too


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from _tensors(item)


def _named_groups(mesh: Mesh) -> list[tuple[str, dist.ProcessGroup]]:
    named = [("world", dist.group.WORLD), ("model", mesh.model_parallel_group), ("data", mesh.data_parallel_group)]
    named += [("tensor", mesh.tensor.group), ("host", mesh.host.group)]
    named += [("pipeline", group) for group in mesh.pipeline.channels.values()]
    return [(axis, group) for axis, group in named if group is not None]
