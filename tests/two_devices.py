"""Emulates a second device on the CPU, with process groups that refuse CPU tensors as NCCL does.

The second device is `cpu:0`. Torch keeps its tensors on the CPU, but distinguishes it from `cpu` wherever code names a
device, so programs run on it unchanged. Two modes record to which device memory belongs. Tensors that are created on
`cpu:0`, moved there, or computed from such tensors belong to the device. Tensors that are moved to `cpu`, or created
without a device, belong to the host. As on a GPU, a tensor of the device has no NumPy view, and most operations refuse
to mix devices.

Groups are made for `cuda` alone (`cuda:gloo`), so torch itself refuses host tensors, with the messages known from NCCL.
Tensors of the device are sent through a second gloo group with the same ranks. Groups that are explicitly made for gloo
serve host values. They refuse tensors of the device, because gloo would read a GPU's pointer as host memory.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE, HOST = torch.device("cpu:0"), torch.device("cpu")
ROOT = Path(__file__).parents[1]
_MAY_MIX = {
    *("copy_", "_to_copy", "_foreach_copy_", "set_", "lift_fresh", "_has_compatible_shallow_copy_type"),
    *("index", "index_put", "index_put_", "_index_put_impl_"),
}
"""Operations that CUDA allows between host and device tensors; all operations may also take a host scalar."""

Site = tuple[str, str]
"""A file of the project and the name of a function in it."""


def is_device(tensor: Tensor) -> bool:
    """Returns whether a tensor is on the second device."""
    return getattr(tensor.untyped_storage(), "is_device", False)


def is_pinned(tensor: Tensor) -> bool:
    """Returns whether a tensor is in pinned host memory, which only `Tensor.pin_memory` allocates here."""
    return getattr(tensor.untyped_storage(), "lies_in_pinned_memory", False)


class TwoDevices:
    """Tracks tensors and routes collectives; `seen` holds the callers of collectives and the dtypes they sent."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[Site, set[str]]] = {"device": {}, "host": {}}
        self.function_modes: list[TorchFunctionMode] = [_Devices()]
        """Modes for backward passes, with the outermost last; torch turns a mode off while the mode handles a call."""
        self._twins: dict[str, dist.ProcessGroup] = {}
        self._new_group, self._init = dist.new_group, dist.init_process_group

    def init_process_group(self, **options: Any) -> None:
        """Creates the default group, which takes tensors of the device."""
        self._init("cuda:gloo", **options)
        self._add_twin(dist.group.WORLD, None)

    def new_group(self, ranks: list[int] | None = None, **options: Any) -> Any:
        """Creates a group for tensors of the device, or for host values if the backend is gloo."""
        group = self._new_group(ranks, **options)
        if options.get("backend") is None:
            self._add_twin(group, ranks)
        return group

    def _add_twin(self, group: Any, ranks: list[int] | None) -> None:
        twin = self._new_group(ranks, backend="gloo")
        if isinstance(group, dist.ProcessGroup):
            self._twins[group.group_name] = twin

    def barrier(self, group: dist.ProcessGroup | None = None, **options: Any) -> Any:
        """Waits for all ranks; NCCL's barrier runs on the device, and gloo's on the host."""
        group = group or dist.group.WORLD
        assert group is not None
        twin = self._twins.get(group.group_name)
        self._note("host" if twin is None else "device", [])
        return (group if twin is None else twin).barrier().wait()

    def noting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function to record its calls on host groups, because other threads run without these modes."""

        def noted(*arguments: Any, **options: Any) -> Any:
            if options["group"].group_name not in self._twins:
                self._note("host", [])
            return call(*arguments, **options)

        return noted

    def route(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Sends tensors that are on the right device, and lets torch refuse others."""
        (boxed,) = (a for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
        group = dist.ProcessGroup.unbox(boxed)
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        on_device = [is_device(tensor) for tensor in tensors]
        twin = self._twins.get(group.group_name)
        if twin is None:
            if any(on_device):
                raise RuntimeError(f"{func}: a tensor of the device in a group of hosts")
            self._note("host", tensors)
        elif all(on_device):
            self._note("device", tensors)
            args = tuple(twin.boxed() if a is boxed else a for a in args)
        return func(*args, **kwargs)  # a tensor of the host in a group of devices: torch refuses it

    def _note(self, kind: str, tensors: Sequence[Tensor]) -> None:
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
        frame: Any = sys._getframe(1)
        while frame is not None:
            path = frame.f_code.co_filename
            if path.startswith(f"{ROOT}/") and "/site-packages/" not in path and "/tests/" not in path:
                self.seen[kind].setdefault((_source_file(path), frame.f_code.co_name), set()).update(dtypes)
            frame = frame.f_back


@cache
def _source_file(path: str) -> str:
    """Returns a file's path in the project, where `beit3_ds/kernels` is a link."""
    return str(Path(path).resolve().relative_to(ROOT))


@contextmanager
def two_devices() -> Iterator[TwoDevices]:
    """Gives this process a second device within the block; no process group may exist yet."""
    from deepspeed.accelerator import get_accelerator

    from beit3_ds.kernels.cpu.allocator import ALLOCATOR

    machine, accelerator = TwoDevices(), get_accelerator()
    dist.new_group, dist.barrier = machine.new_group, machine.barrier
    dist.send, dist.recv = machine.noting(dist.send), machine.noting(dist.recv)
    ALLOCATOR.keep_freed_memory = lambda *arguments, **options: None  # type: ignore[method-assign] # as on a GPU

    def init_process_group(backend: str, **options: Any) -> None:
        machine.init_process_group(**options)

    dist.init_process_group = init_process_group
    kind = type(accelerator)
    kind.current_device_name = lambda self: str(DEVICE)
    kind.device_name = lambda self, device_index=None: str(DEVICE)
    kind.on_accelerator = lambda self, tensor: is_device(tensor)
    kind.communication_backend_name = lambda self: "stands for nccl"
    for name in (
        "BFloat16Tensor",
        "ByteTensor",
        "DoubleTensor",
        "FloatTensor",
        "HalfTensor",
        "IntTensor",
        "LongTensor",
    ):
        make = getattr(torch, name)
        setattr(kind, name, property(lambda self, make=make: lambda *values: make(*values).to(DEVICE)))
    run_backward = torch.autograd._engine_run_backward

    def run_backward_on_two_devices(*arguments: Any, **options: Any) -> Any:
        # Without the modes ZeRO-3 would find its parameters on `cpu` in the hooks of a backward pass.
        with ExitStack() as stack:
            for mode in machine.function_modes:
                stack.enter_context(mode)
            return run_backward(*arguments, **options)

    torch.autograd._engine_run_backward = run_backward_on_two_devices
    with machine.function_modes[0], _Dispatch(machine):
        yield machine


class _Devices(TorchFunctionMode):
    """Reports the device of tensors, and moves tensors between the two devices."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload):  # called by a mode: its device is an input's, which torch passes on
            return func(*args, **kwargs)
        if getattr(func, "__self__", None) is Tensor.device:
            return DEVICE if is_device(args[0]) else HOST
        name = getattr(func, "__name__", "")
        if name in ("numpy", "__array__") and is_device(args[0]):
            raise TypeError("can't convert a tensor of the device to numpy: copy it to the host first")
        if name == "pin_memory":
            return _pin(args[0])
        if name == "cpu":
            return _move(func(*args, **kwargs), args[0], HOST)
        target = named_device(args[1:] if name in ("to", "to_dense") else (), kwargs)
        if name == "to" and target is not None:
            # To torch all are on the CPU: this only changes the type, if it is asked to.
            arguments = (HOST if isinstance(a, torch.device) or _is_device_name(a) else a for a in args)
            options = kwargs | ({"device": HOST} if "device" in kwargs else {})
            return _move(func(*arguments, **options), args[0], target)
        result = func(*args, **kwargs)
        if target is not None and isinstance(result, Tensor) and not any(a is result for a in args):
            result.untyped_storage().is_device = target == DEVICE  # type: ignore[attr-defined]
        return result


class _Dispatch(TorchDispatchMode):
    """Records the device of every operation's results, including those of backward passes."""

    def __init__(self, machine: TwoDevices) -> None:
        super().__init__()
        self._machine = machine

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "c10d":
            return self._machine.route(func, args, kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = {is_device(tensor) for tensor in inputs if tensor.dim() and tensor.numel()}
        name = func._schema.name.partition("::")[2]
        if len(on_device) > 1 and name not in _MAY_MIX:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        target = kwargs.get("device")
        # `cpu` is also what torch itself passes on, as the device of an input; `_Devices` sees what a caller names.
        on_target = target == DEVICE or any(map(is_device, inputs))
        result = func(*args, **kwargs)
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in storages:
                storage.is_device = on_target
        return result


def _move(result: Tensor, source: Tensor, target: torch.device) -> Tensor:
    """Moves a tensor to a device; copies it if it is on the other device."""
    if is_device(source) == (target == DEVICE):
        return result
    if result.untyped_storage()._cdata == source.untyped_storage()._cdata:
        result = result.clone()
    result.untyped_storage().is_device = target == DEVICE  # type: ignore[attr-defined]
    return result


def _pin(tensor: Tensor) -> Tensor:
    """Copies a host tensor to pinned memory; CUDA refuses a tensor of the device."""
    if is_device(tensor):
        raise RuntimeError("cannot pin a tensor of the device: only dense CPU tensors can be pinned")
    pinned = tensor.clone()
    pinned.untyped_storage().lies_in_pinned_memory = True  # type: ignore[attr-defined]
    return pinned


def named_device(arguments: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device | None:
    """Returns the device named in the arguments of a function, or None."""
    for value in (*arguments, kwargs.get("device")):
        if isinstance(value, torch.device) or _is_device_name(value):
            return torch.device(value)
    return None


def _is_device_name(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("cpu", "cuda"))


def _is_group(script_object: torch.ScriptObject) -> bool:
    return "ProcessGroup" in script_object._type().qualified_name()
