"""Runs the fastest implementation of an operator, which is found by timing all of them on the GPU at the first use.

The results are kept in memory and in a file (`choice_file`). A fixed backend replaces the measurement: for comparisons,
and for runs that must not depend on timings.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from beit3_ds.kernels.ops.choice_file import ChoiceFile, choice_file_of

Backend = Literal["auto", "triton", "library", "cuda"]
"""How to implement operators on a GPU: with Triton kernels, with PyTorch's operations and the libraries that these call
(cuBLAS, cuDNN), with kernels in CUDA C++, or with whichever of these is the fastest (`auto`)."""

Name = Literal["triton", "cuda", "varlen", "library"]
"""Name of an implementation; `varlen` is PyTorch's attention for sequences of different lengths."""

_ORDER: Mapping[Backend, tuple[Name, ...]] = {
    "auto": ("triton", "cuda", "varlen", "library"),
    "triton": ("triton", "library"),
    "library": ("varlen", "library"),
    "cuda": ("cuda", "triton", "library"),
}
"""Implementations that each backend may use, in order of preference, because an operator may lack the first."""


class Choices:
    """Chooses implementations for all operators of this process."""

    def __init__(
        self, time: Callable[[Callable[[], Any]], float], open_file: Callable[[torch.device], ChoiceFile]
    ) -> None:
        """Stores the arguments; nothing is measured or read yet.

        Args:
            time: returns the milliseconds of a call on the current device.
            open_file: opens the file of a device's choices.
        """
        self.backend: Backend = "auto"
        """The backend in use; `use_backend` sets it."""
        self._time, self._open_file = time, open_file
        self._files: dict[torch.device, ChoiceFile] = {}

    @contextmanager
    def fixed(self, backend: Backend) -> Iterator[None]:
        """Uses a backend during the block, such as in a check or a comparison of implementations."""
        before, self.backend = self.backend, backend
        try:
            yield
        finally:
            self.backend = before

    def choose(self, device: torch.device, case: str, calls: Mapping[Name, Callable[[], Any]]) -> Name:
        """Returns the implementation to use for a case; measures it if the backend is `auto` and the case is new.

        Args:
            device: device of the operands.
            case: operator, dtype, sizes, and whatever else may decide which implementation is the fastest.
            calls: a call of each implementation that takes these operands.
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
        file.add(case, fastest, milliseconds)
        return fastest

    def _measure(self, case: str, name: Name, call: Callable[[], Any]) -> float:
        try:
            with torch.no_grad():
                return self._time(call)
        except RuntimeError as error:  # of a compiler or a driver, or too little memory for one more result
            warnings.warn(f"{case}: {name} could not be timed and is not used: {error}", stacklevel=2)
            return float("inf")


def _time_on_gpu(call: Callable[[], Any]) -> float:
    """Returns the median milliseconds of a call; clears the L2 cache before each, which keeps the GPU busy meanwhile.

    So the time that Python needs to launch the kernels is hidden.
    """
    from triton.testing import do_bench  # Triton is needed on a GPU only

    return float(do_bench(call, warmup=5, rep=20, return_mode="median"))


CHOICES = Choices(_time_on_gpu, choice_file_of)
"""Choices of this process."""


def use_backend(backend: Backend) -> None:
    """Sets the backend of all operators of this process from now on."""
    CHOICES.backend = backend


class MeasuredOp:
    """Calls the implementation of an operator that `Choices` selects."""

    def __init__(
        self,
        name: str,
        implementations: Mapping[Name, Callable[..., Any]],
        *,
        accepts: Mapping[Name, Callable[..., bool]] | None = None,
        mutates: tuple[int, ...] = (),
        ignores: tuple[int, ...] = (),
        rehearse: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda run: run,
        choices: Choices = CHOICES,
    ) -> None:
        """Stores the arguments.

        Args:
            name: name of the operator, with which its cases begin in the file.
            implementations: functions of the same arguments; the first argument is a tensor.
            accepts: for an implementation that does not take all arguments, a function of the arguments that tells
                whether it takes them; this is also the place of its self-check.
            mutates: indices of tensors that an implementation overwrites; measurements use copies of them.
            ignores: indices of arguments on which the speed does not depend.
            rehearse: turns an implementation into the function that is timed, which may also run its backward pass.
            choices: selects the implementation.
        """
        self._name, self._implementations = name, implementations
        self._accepts, self._rehearse, self._choices = accepts or {}, rehearse, choices
        self._mutates, self._ignores = mutates, ignores
        self._chosen: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Runs the selected implementation; the first call with new dtypes, sizes or flags may measure."""
        described = [_describe(x) for index, x in enumerate(arguments) if index not in self._ignores]
        case = self._choices.backend, arguments[0].device, *described
        run = self._chosen.get(case)
        if run is None:
            run = self._chosen[case] = self._choose(case, arguments)
        return run(*arguments)

    def _choose(self, case: tuple[Any, ...], arguments: tuple[Any, ...]) -> Callable[..., Any]:
        takes = {
            name: run
            for name, run in self._implementations.items()
            if name not in self._accepts or self._accepts[name](*arguments)
        }
        rehearsed = [x.clone() if index in self._mutates else x for index, x in enumerate(arguments)]
        calls = {name: functools.partial(self._rehearse(run), *rehearsed) for name, run in takes.items()}
        text = f"{self._name} {' '.join(map(_format, case[2:]))}"
        return takes[self._choices.choose(arguments[0].device, text, calls)]


def _describe(argument: Any) -> Any:
    """Returns what the speed of an implementation depends on: number, dtype and sizes of tensors, and flags.

    Rows, the first size of a tensor, count as the next power of two, because their number changes with every batch. A
    list of tensors is described by its first tensor, and a list of row numbers by its length.
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
