"""Runs an operator with its fastest implementation, or with the implementation that a selected backend prefers.

With the backend `auto`, all implementations are timed at the first call with new dtypes, sizes or flags. The choice is
stored in memory and in a file (`choice_file`). With any other backend, nothing is timed. Use such a backend to compare
implementations, and for runs that must not depend on timings.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from beit3_ds.kernels.ops.choice_file import ChoiceFile, choice_file_of
from beit3_ds.kernels.ops.current_device import is_current, make_current
from beit3_ds.kernels.prepared import Prepared
from beit3_ds.kernels.triton.architecture import EMULATED, is_on_gpu

Backend = Literal["auto", "triton", "library", "cuda"]
"""Implementations that operators prefer on a GPU. `triton`: this project's Triton kernels. `library`: PyTorch's
operations, which call cuBLAS and cuDNN. `cuda`: this project's CUDA C++ kernels. `auto`: for each operator, the fastest
implementation that supports the arguments. If the preferred implementation does not support the arguments, an operator
uses another one (`_ORDER`)."""

Name = Literal["triton", "cuda", "varlen", "library"]
"""Name of an implementation. `varlen` is PyTorch's variable-length attention; the other names are as in `Backend`."""

_ORDER: Mapping[Backend, tuple[Name, ...]] = {
    "auto": ("triton", "cuda", "varlen", "library"),
    "triton": ("triton", "library"),
    "library": ("varlen", "library"),
    "cuda": ("cuda", "triton", "library"),
}
"""Implementations that each backend may use. The backend `auto` uses the fastest implementation that supports the
arguments. Every other backend uses the first listed implementation that supports the arguments."""


class Choices:
    """Chooses the implementation of each operator in this process."""

    def __init__(
        self, time: Callable[[Callable[[], Any]], float], open_file: Callable[[torch.device], ChoiceFile]
    ) -> None:
        """Stores the arguments, without measuring or reading anything.

        Args:
            time: function that runs a call repeatedly and returns the milliseconds per call.
            open_file: function that opens the file with the stored choices for a device.
        """
        self.backend: Backend = "auto"
        """Current backend. `use_backend` sets it."""
        self._time, self._open_file = time, open_file
        self._files: dict[torch.device, ChoiceFile] = {}

    @contextmanager
    def fixed(self, backend: Backend) -> Iterator[None]:
        """Sets the backend inside a `with` block, for example to check or compare implementations."""
        before, self.backend = self.backend, backend
        try:
            yield
        finally:
            self.backend = before

    def choose(self, device: torch.device, case: str, calls: Mapping[Name, Callable[[], Any]]) -> Name:
        """Returns the name of the implementation to use. With the backend `auto`, a new case is measured first.

        Args:
            device: device of the operator's tensors.
            case: text with the operator's name and the dtypes, sizes and flags of the arguments.
            calls: functions that run an implementation once, by the implementation's name. The functions take no
                arguments.
        """
        available = [name for name in _ORDER[self.backend] if name in calls]
        if len(available) == 1 or self.backend != "auto":
            return available[0]
        if device not in self._files:
            self._files[device] = self._open_file(device)
        file = self._files[device]
        known = file.find(case)
        for name in available:
            if name == known:
                return name
        milliseconds = {name: self._measure(case, name, calls[name]) for name in available}
        fastest = min(available, key=lambda name: milliseconds[name])
        if all(map(math.isfinite, milliseconds.values())):  # if not, memory may suffice in the next process
            file.add(case, fastest, milliseconds)
        return fastest

    def _measure(self, case: str, name: Name, call: Callable[[], Any]) -> float:
        try:
            with torch.no_grad():
                return self._time(call)
        except RuntimeError as error:  # raised by a compiler or driver, or because memory is short
            warnings.warn(f"{case}: {name} could not be timed and is not used: {error}", stacklevel=2)
            return float("inf")


def _time_on_gpu(call: Callable[[], Any]) -> float:
    """Returns the median milliseconds of a call's GPU work, without the time that Python needs for launches.

    The GPU clears the L2 cache before each repetition. Meanwhile, Python launches the kernels.
    """
    from triton.testing import do_bench  # Triton is needed on a GPU only

    return float(do_bench(call, warmup=5, rep=20, return_mode="median"))


CHOICES = Choices(_time_on_gpu, choice_file_of)
"""Chooses the implementations of all operators in this process."""


def use_backend(backend: Backend) -> None:
    """Sets the backend of all operators in this process."""
    CHOICES.backend = backend


_MOST_CALLS = 1024
"""Maximum number of different argument sizes for which an operator remembers the implementation."""


class MeasuredOp:
    """Calls an operator with the implementation that `Choices` selects for the arguments."""

    def __init__(
        self,
        name: str,
        implementations: Mapping[Name, Callable[..., Any]],
        *,
        on_cpu: Callable[..., Any] | None = None,
        accepts: Mapping[Name, Callable[..., bool]] | None = None,
        mutates: tuple[int, ...] = (),
        ignores: tuple[int, ...] = (),
        rehearse: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda run: run,
        choices: Choices = CHOICES,
    ) -> None:
        """Stores the arguments, without measuring anything.

        Args:
            name: name of the operator, which is the first word of each stored measurement.
            implementations: functions that implement the operator, by name. They have the same arguments, and the first
                argument is a tensor. A `Prepared` implementation is prepared again only for new dtypes, sizes or flags.
            on_cpu: function for tensors on a CPU. With None, tensors on a CPU also use one of `implementations`.
            accepts: maps names of implementations to functions that return whether the implementation supports given
                arguments. Such a function may also check, at the first use, that the implementation computes correct
                results. An implementation without such a function supports all arguments.
            mutates: indices of arguments that an implementation overwrites. Measurements use copies of these arguments.
            ignores: indices of arguments that do not affect the speed.
            rehearse: function that converts an implementation to the function that is timed, for example to time the
                backward pass too.
            choices: object that selects the implementation.
        """
        self._name, self._implementations, self._on_cpu = name, implementations, on_cpu
        self._accepts, self._rehearse, self._choices = accepts or {}, rehearse, choices
        self._mutates, self._ignores = mutates, ignores
        self._chosen: dict[Any, Callable[..., Any]] = {}
        self._recent: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Runs the selected implementation on the device of the first argument.

        The first call with new dtypes, sizes or flags may time all implementations.
        """
        first = arguments[0]
        if self._on_cpu is not None and not is_on_gpu(first):
            return self._on_cpu(*arguments)
        device = first.device
        call = _identify((self._choices.backend, device, EMULATED.architecture), arguments)
        run = self._recent.get(call)
        if run is not None and is_current(device):
            return run(*arguments)
        with make_current(device):
            run = run or self._select(call, device, arguments)
            return run(*arguments)

    def _select(self, call: Any, device: torch.device, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        compared = [x for index, x in enumerate(arguments) if index not in self._ignores]
        case = self._choices.backend, device, *map(_describe, compared)
        chosen = self._chosen.get(case)
        if chosen is None:
            chosen = self._chosen[case] = self._choose(case, arguments)
        run = _prepare(chosen, arguments)
        if len(self._recent) >= _MOST_CALLS:  # numbers of rows differ from batch to batch
            self._recent.clear()
        self._recent[call] = run
        return run

    def _choose(self, case: tuple[Any, ...], arguments: tuple[Any, ...]) -> Callable[..., Any]:
        takes = {
            name: run
            for name, run in self._implementations.items()
            if name not in self._accepts or self._accepts[name](*arguments)
        }
        rehearsed = [_copy(x) if index in self._mutates else x for index, x in enumerate(arguments)]
        calls = {
            name: functools.partial(self._rehearse(_prepare(run, rehearsed)), *rehearsed) for name, run in takes.items()
        }
        text = f"{self._name} {' '.join(map(_format, case[2:]))}"
        return takes[self._choices.choose(arguments[0].device, text, calls)]


def _prepare(implementation: Callable[..., Any], arguments: Sequence[Any]) -> Callable[..., Any]:
    """Prepares `implementation` for the dtypes, sizes and flags of `arguments`, and returns a function that runs it.

    The returned function accepts all arguments with these dtypes, sizes and flags. If there is nothing to prepare, the
    function is `implementation` itself.
    """
    return implementation.prepare(*arguments) if isinstance(implementation, Prepared) else implementation


def _copy(x: Tensor) -> Tensor:
    """Returns a copy of `x` with the same strides. `clone` would remove the padding between rows.

    Also pads the last row, because kernels may write to the padding.
    """
    if x.ndim != 2 or x.is_contiguous():
        return x.clone()
    return x.new_empty(len(x), x.stride(0))[:, : x.shape[1]].copy_(x)


def _identify(place: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns a key for a call: `place` (backend and device), then dtypes, exact sizes and flags of the arguments.

    Unlike `_describe`, this function does not round sizes: a call is prepared for exact sizes, and the key must be fast
    to compute.
    """
    call: list[Any] = [*place]
    for argument in arguments:
        kind = type(argument)
        if kind is tuple or kind is list:
            first = argument[0] if argument else None
            if kind is tuple and type(first) is int:  # a call is prepared for its experts' stop rows
                call.append(argument)
            elif isinstance(first, Tensor):
                call += len(argument), first.shape, first.dtype
            else:
                call.append(len(argument))
        elif kind is Tensor or isinstance(argument, Tensor):
            call += argument.shape, argument.dtype
        else:
            call.append(argument)
    return tuple(call)


def _describe(argument: Any) -> Any:
    """Returns those properties of an argument that affect the speed: a tensor's dtype and sizes, or a flag's value.

    The number of rows, which is a tensor's first size, changes from batch to batch. So it is rounded up to a power of
    two. A list of tensors is described by its length and its first tensor. Any other list, such as the experts' stop
    rows, is described by its length.
    """
    if isinstance(argument, Tensor):
        rows, *sizes = argument.shape
        return (argument.dtype, 1 << (rows - 1).bit_length() if rows else 0, *sizes)
    if isinstance(argument, list | tuple):
        if argument and isinstance(argument[0], Tensor):
            return (len(argument), argument[0].dtype, *argument[0].shape)
        return len(argument)
    return argument


def _format(description: Any) -> str:
    parts = description if isinstance(description, tuple) else (description,)
    return "x".join(str(part).removeprefix("torch.") for part in parts)
