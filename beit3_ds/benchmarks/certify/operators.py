"""Times each op with this project's and other implementations.

The shapes are those of the base and giant models; on a CPU, those of the tiny model.
"""

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from beit3_ds.benchmarks.certify.clock import Clock
from beit3_ds.benchmarks.certify.device_kind import kind_of
from beit3_ds.benchmarks.certify.recorder import Recorder
from beit3_ds.benchmarks.kernels.case import Case, Implementation, Problem
from beit3_ds.benchmarks.kernels.cases import build_cases
from beit3_ds.benchmarks.turns import device_of_turns
from beit3_ds.kernels.ops import cuda_kernels
from beit3_ds.kernels.ops.choice_file import choice_file_of
from beit3_ds.kernels.ops.measured_op import CHOICES, Backend

_OURS = "beit3_ds"
_LATE = ("compile", "Flex")  # implementations that take long to compile
_ROUNDS = {"cuda": 20, "cpu": 2, "dry": 1}
_SAMPLES = {"cuda": 32, "cpu": 1, "dry": 1}
_SIZES = {"cuda": ("base", "giant"), "cpu": ("tiny",), "dry": ("base", "giant")}
_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32, "dry": torch.bfloat16}
_NAMES = ("packed_attention", "multiway FFN", "multiway layer norm", "linear_cross_entropy")  # in order of build_cases


def measure(recorder: Recorder) -> None:
    """Times each op with each implementation, for each model size, and records each result.

    Implementations that take long to compile come last.
    """
    device = device_of_turns()
    kind = kind_of(device)
    clock = Clock(device)
    late = []
    for size in _SIZES[kind]:
        builders = build_cases(size, _SAMPLES[kind], device, _DTYPES[kind])
        for op, build in zip(_NAMES, builders, strict=True):
            case = build()
            assert case.op == op, f"{case.op} is not {op}"
            for name, entry, backend in _candidates(case, device):
                compute = partial(_measure, clock, case, entry, backend)
                if any(word in name for word in _LATE):
                    late.append((f"{size} {op}: {name}", partial(_rebuild, clock, build, entry.name)))
                else:
                    recorder.measure(f"{size} {op}: {name}", compute)
            keep_choices(recorder, device)
            del case, compute, entry
    for item, late_compute in late:
        recorder.measure(item, late_compute)


def keep_choices(recorder: Recorder, device: torch.device) -> None:
    """Copies the file that lists this machine's fastest implementations (`choice_file`) to the report's folder.

    Users can add the copy to the package, so that machines with the same GPU need not measure the ops again.
    """
    path = choice_file_of(device).path if device.type == "cuda" else None
    if path is not None and path.exists():
        folder = recorder.folder / "choices"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / path.name)


def using(backend: Backend | None) -> AbstractContextManager[None]:
    """Returns a context manager that sets the backend of ops. None leaves the backend unchanged."""
    return nullcontext() if backend is None else CHOICES.fixed(backend)


def _candidates(case: Case, device: torch.device) -> Iterator[tuple[str, Implementation, Backend | None]]:
    """Yields name, implementation and backend of each measurement.

    On a CPU, this project's op is measured once, without a backend. On other devices, it is measured with each
    available backend.
    """
    backends: tuple[Backend, ...] = ("auto", "triton", "library", "cuda")
    for entry in case.implementations:
        if entry.name != _OURS:
            yield entry.name, entry, None
        elif kind_of(device) == "cpu":
            yield f"{_OURS}, CPU form", entry, None
        else:
            for backend in backends:
                if backend != "cuda" or cuda_kernels.is_built():
                    yield f"{_OURS}, {backend}", entry, backend


def _rebuild(clock: Clock, build: Callable[[], Case], name: str) -> dict[str, Any]:
    if clock.kind == "dry":
        return {"not_run": "a dry run does not compile other libraries"}
    case = build()
    return _measure(clock, case, next(entry for entry in case.implementations if entry.name == name), None)


def _measure(clock: Clock, case: Case, entry: Implementation, backend: Backend | None) -> dict[str, Any]:
    """Times the forward and backward pass of one implementation, and compares its output with a reference.

    The reference is the output of this project's op with the backend `library`.

    Args:
        clock: clock that times the passes.
        case: the op and its sizes.
        entry: the implementation to time.
        backend: backend of this project's ops while `entry` runs; None leaves the backend unchanged.
    """
    if entry.build is None:
        return {"not_run": entry.why_absent}
    rounds = _ROUNDS[clock.kind]
    with using(backend):
        problem = entry.build()
        error = _error(case, problem)
        peak = _peak(problem, clock.device)
        forward = clock.time(lambda _: problem.run(), rounds)
        differentiate: Callable[[Tensor], Any] = functools.partial(_differentiate, problem)
        backward = clock.time(differentiate, rounds, problem.run)
    both = forward.median + backward.median
    cost = case.cost("both")
    rate = {"tflops": cost.flops / both / 1e9} if case.is_compute_bound else {"gb_per_s": cost.bytes / both / 1e6}
    return {
        "shape": case.shape,
        "forward_ms": forward.median,
        "backward_ms": backward.median,
        **rate,
        "host_ms": forward.host_milliseconds + backward.host_milliseconds,
        "peak_mb": peak,
        "difference": error,
        "passed": error < 2e-2,
    }


def _differentiate(problem: Problem, y: Tensor) -> Any:
    return torch.autograd.grad(y, problem.leaves, problem.dy)


def _error(case: Case, problem: Problem) -> float:
    """Returns the relative difference of an implementation's result from the result of this project's op.

    This project's op uses the backend `library`.
    """
    build = case.implementations[0].build
    assert build is not None
    with torch.no_grad():
        with CHOICES.fixed("library"):
            first = build()
            expected = first.packed(first.run()).float()
        y = problem.packed(problem.run()).float()
    return float((y - expected).norm() / expected.norm())


def _peak(problem: Problem, device: torch.device) -> float | None:
    """Returns the peak increase in allocated GPU memory during a forward and backward pass, in MB.

    Returns None on a CPU.
    """
    if kind_of(device) == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _differentiate(problem, problem.run())
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / 1e6
