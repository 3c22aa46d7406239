"""Tests that each operator uses its fastest trusted implementation, and measures it once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_ds.kernels.ops.choice_file import ChoiceFile
from beit3_ds.kernels.ops.measured_op import CHOICES, Choices, MeasuredOp, use_backend
from beit3_ds.kernels.prepared import Prepared


class Clock:
    """Fakes a GPU's timer: a call takes the milliseconds that are set for its implementation."""

    def __init__(self, folder: Path | None = None) -> None:
        self.milliseconds, self.timed, self._last = {"triton": 1.0, "library": 2.0}, list[str](), ""
        self.choices = Choices(self._time, lambda device: ChoiceFile("gpu.json", folder))

    def implementation(self, name: str, function: Callable[..., Any] = lambda *arguments: None) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self._last = name
            result = function(*arguments)
            return name if result is None else result

        return run

    def op(self, name: str = "op", **options: Any) -> MeasuredOp:
        implementations: Any = {name: self.implementation(name) for name in self.milliseconds}
        return MeasuredOp(name, implementations, choices=self.choices, **options)

    def _time(self, call: Callable[[], Any]) -> float:
        call()
        self.timed.append(self._last)
        return self.milliseconds[self._last]


@pytest.mark.parametrize(("library", "fastest"), [(2.0, "triton"), (0.5, "library")])
def test_the_fastest_is_used_and_measured_once(library: float, fastest: str) -> None:
    """Checks that a slow implementation is not chosen, whichever it is."""
    clock = Clock()
    clock.milliseconds["library"] = library
    op = clock.op()
    assert [op(torch.ones(5, 3)) for _ in range(3)] == [fastest] * 3
    assert sorted(clock.timed) == ["library", "triton"]


def test_an_implementation_that_fails_its_check_is_not_measured() -> None:
    clock = Clock()
    clock.milliseconds["cuda"] = 0.1
    op = clock.op(accepts={"cuda": lambda x: False})
    assert op(torch.ones(5, 3)) == "triton" and "cuda" not in clock.timed


def test_an_implementation_that_cannot_run_is_not_chosen(tmp_path: Path) -> None:
    """Checks that a failed implementation is not chosen, and that the choice is not stored.

    A later process may have more memory.
    """

    def fail(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    clock = Clock(tmp_path)
    implementations: Any = {"triton": clock.implementation("triton", fail), "library": clock.implementation("library")}
    op = MeasuredOp("op", implementations, choices=clock.choices)
    with pytest.warns(UserWarning, match="triton could not be timed and is not used: out of memory"):
        assert op(torch.ones(5, 3)) == "library"
    assert op(torch.ones(5, 3)) == "library"
    later = Clock(tmp_path)
    assert later.op()(torch.ones(5, 3)) == "triton" and sorted(later.timed) == ["library", "triton"]


@pytest.mark.parametrize(
    ("argument", "is_new"),
    [
        (torch.ones(7, 3), False),  # the same power of two
        (torch.ones(9, 3), True),
        (torch.ones(0, 3), True),
        (torch.ones(5, 4), True),
        (torch.ones(5, 3, dtype=torch.bfloat16), True),
    ],
)
def test_cases_differ_in_dtype_width_and_rows_to_a_power_of_two(argument: torch.Tensor, is_new: bool) -> None:
    clock = Clock()
    op = clock.op()
    op(torch.ones(5, 3))
    before = len(clock.timed)
    op(argument)
    assert (len(clock.timed) > before) == is_new


def test_flags_lists_and_operators_are_cases_too() -> None:
    clock = Clock()
    op, other = clock.op(), clock.op("other", ignores=(2,))
    x = torch.ones(5, 3)
    calls: list[tuple[MeasuredOp, tuple[Any, ...], int]] = [
        (op, (x, True, [5]), 2),
        (op, (x, False, [5]), 2),
        (op, (x, False, [2, 3]), 2),
        (op, (x, False, [4, 1]), 0),
        (op, (x, False, [x, x]), 2),
        (op, (x, None, [x, x]), 2),
        (other, (x, None, 1), 2),
        (other, (x, None, 2), 0),
    ]
    for measured, arguments, count in calls:
        before = len(clock.timed)
        measured(*arguments)
        assert len(clock.timed) - before == count, arguments[1:]


def test_calls_are_prepared_once_for_dtypes_sizes_stop_rows_and_flags() -> None:
    """Catches a prepared call that is used for the stop rows of another batch."""
    clock, prepared = Clock(), list[tuple[int, ...]]()

    @Prepared
    def prepare(x: torch.Tensor, stops: tuple[int, ...], weights: list[torch.Tensor]) -> Callable[..., Any]:
        prepared.append(stops)
        return lambda x, stops_now, weights: (stops, weights[0])

    op = MeasuredOp("op", {"triton": prepare}, choices=clock.choices)
    x, weights = torch.ones(5, 3), [torch.ones(2, 3), torch.zeros(2, 3)]
    for stops in ((2, 5), (2, 5), (3, 5), (2, 5), (3, 5)):
        for weight in weights:
            stops_used, weight_used = op(x, stops, [weight])
            assert stops_used == stops and weight_used is weight
    assert prepared == [(2, 5), (2, 5), (3, 5)]  # the first is for measurements


def test_a_stored_choice_is_used_without_measurement(tmp_path: Path) -> None:
    first = Clock(tmp_path)
    first.milliseconds["library"] = 0.5
    first.op()(torch.ones(5, 3))
    second = Clock(tmp_path)
    assert second.op()(torch.ones(5, 3)) == "library" and second.timed == []


def test_a_stored_choice_that_is_not_trusted_here_is_measured_again(tmp_path: Path) -> None:
    first = Clock(tmp_path)
    first.milliseconds["cuda"] = 0.1
    first.op()(torch.ones(5, 3))
    second = Clock(tmp_path)
    assert second.op()(torch.ones(5, 3)) == "triton" and sorted(second.timed) == ["library", "triton"]


@pytest.mark.parametrize(("backend", "used"), [("triton", "triton"), ("library", "library"), ("cuda", "triton")])
def test_a_fixed_backend_measures_nothing(backend: Any, used: str) -> None:
    """Checks fixed backends; `cuda` uses Triton for operators without a CUDA C++ kernel."""
    clock = Clock()
    clock.choices.backend = backend
    assert clock.op()(torch.ones(5, 3)) == used and clock.timed == []


def test_changing_the_backend_applies_to_known_cases() -> None:
    clock = Clock()
    op, x = clock.op(), torch.ones(5, 3)
    assert op(x) == "triton"
    clock.choices.backend = "library"
    assert op(x) == "library"


def test_measurements_leave_the_arguments_as_they_are() -> None:
    """Catches an operator that overwrites its argument once per measured implementation."""
    clock = Clock()
    implementations: Any = {name: clock.implementation(name, lambda x: x.add_(1)) for name in clock.milliseconds}
    x = torch.zeros(4)
    MeasuredOp("op", implementations, mutates=(0,), choices=clock.choices)(x)
    assert x.tolist() == [1.0] * 4


def test_what_is_timed_can_include_the_backward_pass() -> None:
    """Checks that the fastest forward implementation is not chosen if its backward pass is slow."""
    clock = Clock()
    clock.milliseconds |= {"triton backward": 9.0, "library backward": 3.0}

    def rehearse(run: Callable[..., Any]) -> Callable[..., Any]:
        def both(*arguments: Any) -> None:
            clock._last = f"{run(*arguments)} backward"

        return both

    implementations: Any = {name: clock.implementation(name) for name in ("triton", "library")}
    op = MeasuredOp("op", implementations, rehearse=rehearse, choices=clock.choices)
    assert op(torch.ones(5, 3)) == "library"


def test_the_process_has_one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHOICES, "backend", "auto")
    use_backend("library")
    assert CHOICES.backend == "library"


class OnSecondGpu:
    """Fakes a tensor on the second GPU."""

    device = torch.device("cuda:1")


def test_everything_runs_with_the_operands_device_as_the_current_one(two_gpus: list[int]) -> None:
    """Catches a launch, check or measurement on the first GPU with operands on the second."""
    current = list[int]()
    note: Callable[..., Any] = lambda *arguments: current.append(two_gpus[-1]) or True  # noqa: E731
    clock = Clock()
    implementations: Any = {name: clock.implementation(name, note) for name in clock.milliseconds}
    op = MeasuredOp("op", implementations, accepts={"triton": note}, choices=clock.choices)
    x = OnSecondGpu()
    op(x)
    assert current == [1] * 4 and two_gpus == [0]  # acceptance, two measurements and the call
    op(x)
    assert current == [1] * 5 and two_gpus == [0]


def test_a_call_on_the_current_device_switches_nothing(two_gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches unneeded switches of the device, because host time per launch is scarce."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.fail("the device was switched"))
    op = Clock().op()
    op(torch.ones(5, 3))
    two_gpus.append(1)
    op(OnSecondGpu())


def test_copies_for_measurements_keep_the_padding_of_rows() -> None:
    """Catches a copy without padding, which kernels for padded rows refuse or write beyond."""
    seen: list[torch.Tensor] = []
    op, x = (
        Clock().op(mutates=(0,), rehearse=lambda run: lambda x: (seen.append(x), run(x))[1]),
        torch.ones(3, 64)[:, :50],
    )
    op(x)
    assert len(seen) == 2
    for copy in seen:
        assert copy.stride() == x.stride() and torch.equal(copy, x) and copy.data_ptr() != x.data_ptr()
        assert copy.untyped_storage().nbytes() == 3 * 64 * 4
