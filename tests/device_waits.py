"""Counts where a program on the emulated second device (`two_devices`) waits for that device.

On a GPU, the host runs ahead of the device. The host waits when it reads a value of the device, runs an operation whose
output shape depends on values, or copies unpinned memory.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.two_devices import DEVICE, HOST, ROOT, TwoDevices, is_device, is_pinned, named_device

_READS = {"_local_scalar_dense", "equal", "is_nonzero", "bincount", "histc"}
_DEPENDS_ON_VALUES = {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "nms"}
_TAKES_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPIES_VALUES = {"tensor", "as_tensor", "asarray"}


class DeviceWaits:
    """Holds every wait since the last `clear`: the operation, and the nearest calling function of this project."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def clear(self) -> Counter[str]:
        """Returns the waits so far and starts counting again."""
        found, self.found = self.found, Counter()
        return found

    def note(self, operation: str) -> None:
        """Records a wait for an operation."""
        frame: Any = sys._getframe(1)
        while frame is not None:
            path = frame.f_code.co_filename
            if path.endswith("distributed_c10d.py"):
                return  # gloo copies its results, which are the device's
            if path.startswith(f"{ROOT}/") and "/site-packages/" not in path and "/tests/" not in path:
                self.found[f"{operation} in {Path(path).name}:{frame.f_code.co_name}"] += 1
                return
            frame = frame.f_back
        self.found[f"{operation} outside the project"] += 1


@contextmanager
def watching(machine: TwoDevices) -> Iterator[DeviceWaits]:
    """Counts waits in the `with` block, which must be inside the `two_devices` block that gave `machine`."""
    waits = DeviceWaits()
    functions = _Functions(waits)
    machine.function_modes.append(functions)
    with functions, _Operations(waits):
        yield waits


class _Functions(TorchFunctionMode):
    """Finds waits in functions that are not dispatched as operations, because the two devices are really the CPU."""

    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if name in _COPIES_VALUES and named_device((), kwargs) == DEVICE and (source is None or not is_device(source)):
            self._waits.note(f"{name} from pageable memory")
        if source is not None:
            self._check_move(name, source, args[1:], kwargs)
        return func(*args, **kwargs)

    def _check_move(self, name: str, source: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_device(source) and (name in ("cpu", "tolist") or (name == "to" and named_device(rest, kwargs) == HOST)):
            self._waits.note(name)
        if name == "to" and named_device(rest, kwargs) == DEVICE and not is_device(source):
            if not is_pinned(source):
                self._waits.note("to from pageable memory")
            elif not kwargs.get("non_blocking"):
                self._waits.note("blocking to")


class _Operations(TorchDispatchMode):
    """Finds operations that wait, including those of backward passes."""

    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.partition("::")[2]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(map(is_device, inputs)):
            self._check(name, args, kwargs, inputs)
        return func(*args, **kwargs)

    def _check(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor]) -> None:
        repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in _READS or name in _DEPENDS_ON_VALUES or repeats:
            self._waits.note(name)
        elif name in _TAKES_INDICES:
            for index in tree_leaves(args[1]):
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self._waits.note(f"{name} with a mask")
                elif isinstance(index, Tensor) and not is_device(index) and index.dim():
                    self._waits.note(f"{name} with an index in host memory")
        elif name in ("copy_", "_foreach_copy_"):
            target, source = (tree_leaves(part)[0] for part in args[:2])
            if is_device(source) and not is_device(target):
                self._waits.note(f"{name} to host memory")
            elif is_device(target) and not is_device(source) and not (is_pinned(source) and args[2:]):
                self._waits.note(f"{name} from pageable memory")
