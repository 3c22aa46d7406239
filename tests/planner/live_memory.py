"""Measures the memory of a rank: storages of live tensors, and tensors that autograd saves for backward passes."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from beit3_ds.pipeline.schedule import Schedule

# What a tensor is, by the shortest path on which it is reached; the first pattern that is found decides.
_PARTS = {
    "buckets": r"ipg_buckets",
    "gradients": r"\.grad\b|grad_accum|averaged_grad|all_grad_tensors|grads_in_partition|grad_partition|tied\._sum",
    "parameters": r"^module|lp_param_buffer|bit16_groups|fp16_groups|fp16_partitioned|tied\._copy|ds_tensor",
    "optimizer": r"\.state\[|fp32_partitioned_groups_flat|single_partition_of_fp32|param_groups",
}


def state_bytes(schedule: Schedule) -> dict[str, int]:
    """Returns the bytes of storages reachable from the engine's module, the optimizer and the tied table, by part.

    Each storage counts once, under the first part of `_PARTS` that matches one of its paths, or else under `other`.
    """
    paths: dict[int, list[str]] = {}
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    roots = {"module": dict(schedule.engine.module.named_parameters()), "optimizer": schedule.engine.optimizer}
    for name, root in {**roots, "tied": schedule.tied}.items():
        for path, tensor in _reachable(name, root, seen):
            storage = tensor.untyped_storage()
            if tensor.device.type != "meta" and storage.nbytes():
                paths.setdefault(storage.data_ptr(), []).append(path)
                sizes[storage.data_ptr()] = storage.nbytes()
    totals: Counter[str] = Counter()
    for pointer, own in paths.items():
        found = (part for part, pattern in _PARTS.items() if any(re.search(pattern, path) for path in own))
        totals[next(found, "other")] += sizes[pointer]
    return dict(totals)


def _reachable(path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if id(value) in seen and not isinstance(value, Tensor):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield path, value
        for name in ("grad", "ds_tensor", "grad_accum"):
            inner = getattr(value, name, None)
            if isinstance(inner, Tensor):
                yield f"{path}.{name}", inner
    elif isinstance(value, list | tuple | set):
        for item in list(value):
            yield from _reachable(f"{path}[]", item, seen)
    elif isinstance(value, dict):
        for key, item in list(value.items()):
            yield from _reachable(f"{path}[{key if isinstance(key, str) else ''}]", item, seen)
    elif type(value).__module__.split(".")[0] in ("torch", "deepspeed", "beit3_ds") and not isinstance(
        value, nn.Module
    ):
        for name, item in list(getattr(value, "__dict__", {}).items()):
            yield from _reachable(f"{path}.{name}", item, seen)


class SavedTensors:
    """Counts storages saved for backward passes while it is entered, each once and without parameters."""

    def __init__(self, module: nn.Module, when_used: Callable[[], None] = lambda: None) -> None:
        self.live, self.peak = 0, 0
        self._module, self._when_used = module, when_used
        self._holders: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> "SavedTensors":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Any:
        # Under ZeRO-3 a parameter's storage changes from pass to pass, so the pointers are looked up each time.
        pointer = tensor.untyped_storage().data_ptr()
        own = itertools.chain(self._module.parameters(), self._module.buffers())  # a tied table's copy is a buffer
        if any(pointer == p.untyped_storage().data_ptr() for p in own):
            return tensor
        self._when_used()
        return _Saved(self, tensor)

    def _unpack(self, packed: Any) -> Tensor:
        self._when_used()
        return packed.tensor if isinstance(packed, _Saved) else packed

    def hold(self, storage: torch.UntypedStorage) -> None:
        if not storage.nbytes():
            return
        self._holders[storage.data_ptr()] += 1
        if self._holders[storage.data_ptr()] == 1:
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)

    def drop(self, storage: torch.UntypedStorage) -> None:
        if not storage.nbytes():
            return
        self._holders[storage.data_ptr()] -= 1
        if self._holders[storage.data_ptr()] == 0:
            self.live -= storage.nbytes()


class _Saved:
    def __init__(self, counter: SavedTensors, tensor: Tensor) -> None:
        self.tensor, self._counter = tensor, counter
        counter.hold(tensor.untyped_storage())

    def __del__(self) -> None:
        self._counter.drop(self.tensor.untyped_storage())


def bucket_bytes(optimizer: Any) -> int:
    """Returns the bytes of the buffers in which DeepSpeed currently collects gradients."""
    buffers = [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
    tensors = [t for buffer in buffers for t in (buffer if isinstance(buffer, list) else [buffer]) if t is not None]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def gathered_bytes(module: nn.Module) -> int:
    """Returns the bytes of parameters that ZeRO-3 has currently gathered, without persistent ones and partitions."""
    return sum(
        parameter.numel() * parameter.element_size()
        for parameter in module.parameters()
        if hasattr(parameter, "ds_persist")
        and not parameter.ds_persist
        and parameter.ds_numel > parameter.ds_tensor.numel()
    )
