"""Launches kernels with little Python time, and finds a kernel's fastest settings at the first launch.

At every launch, Triton itself inspects all arguments, and selects a compiled variant by their types, values and
alignment. This takes more time than many kernels need. `KernelLauncher` lets Triton do this only at the first launch of
a variant.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial, reduce
from operator import attrgetter, or_
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from triton.errors import TritonError
from triton.runtime import driver as drivers

from beit3_ds.kernels.triton.architecture import is_on_gpu

_Settings = TypeVar("_Settings")

_ALIGNMENT = 16
"""Alignment of pointers in bytes. Triton compiles a faster variant for pointers that have this alignment."""

_LEAST_ROW_CLASS = 11
"""Lowest value of `row_class`. All row counts up to 2 ** 11 have this value, because kernels with few rows are fast
with any settings."""

_dtype_of, _address_of = attrgetter("dtype"), Tensor.data_ptr


class _Variant(NamedTuple):
    """Holds a compiled kernel that is ready to launch."""

    run: Callable[..., Any]
    function: Any
    packed_metadata: Any


class Launch:
    """Launches one kernel with a fixed grid and fixed scalar arguments. Calls differ only in the tensors' addresses.

    The tensors of all calls have the same dtypes.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        options: dict[str, int],
        variants: dict[Hashable, _Variant],
    ) -> None:
        """Stores the arguments without compiling anything. Use `KernelLauncher.prepare` to build a launch.

        Args:
            kernel: function decorated with `triton.jit`.
            grid: number of Triton programs along each of one to three axes.
            arguments: arguments of the kernel after the tensors: numbers, then constants.
            options: Triton's options `num_warps` and `num_stages`.
            variants: compiled kernels for these options and constants, by device, dtypes and alignment of the tensors.
                The launch adds entries to this dict.
        """
        self._kernel, self._grid, self._arguments, self._options = kernel, grid, arguments, options
        self._programs, self._variants = (*grid, 1, 1)[:3], variants
        self._aligned: dict[Hashable, _Variant] = {}  # by device, for tensors that are all aligned

    def __call__(self, *tensors: Tensor) -> None:
        """Launches the kernel on the current GPU, or runs it in Triton's interpreter if the tensors are on a CPU.

        In a process that emulates a GPU, the kernel is launched even if the tensors are on a CPU.

        Args:
            tensors: first arguments of the kernel, contiguous.
        """
        if not self._aligned and not is_on_gpu(tensors[0]):
            self._kernel[self._grid](*tensors, *self._arguments, **self._options)
            return
        driver, addresses = drivers.active, [*map(_address_of, tensors)]
        device = driver.get_current_device()
        variant = self._aligned.get(device)
        if variant is None or reduce(or_, addresses) % _ALIGNMENT:
            variant = self._find_variant(device, tensors, addresses)
            if variant is None:
                return
        run, function, metadata = variant
        # The three arguments after the metadata are for hooks of Triton's own profiler. Triton's launcher would ask
        # every tensor for its address, and the driver about every address.
        run(
            *self._programs,
            driver.get_current_stream(device),
            function,
            metadata,
            None,
            None,
            None,
            *addresses,
            *self._arguments,
        )

    def _find_variant(self, device: Hashable, tensors: tuple[Tensor, ...], addresses: list[int]) -> _Variant | None:
        """Returns the compiled kernel for the device, and for the dtypes and alignment of `tensors`.

        If there is none yet, Triton compiles and launches the kernel, and this method returns None.
        """
        misaligned = [index for index, address in enumerate(addresses) if address % _ALIGNMENT]
        key = device, *map(_dtype_of, tensors), *misaligned
        variant = self._variants.get(key)
        if variant is None:
            compiled = self._kernel[self._grid](*tensors, *self._arguments, **self._options)
            self._variants[key] = _Variant(compiled.run, compiled.function, compiled.packed_metadata)
        elif not misaligned:
            self._aligned[device] = variant
        return variant


class KernelLauncher:
    """Prepares launches of one kernel, and keeps the kernel's compiled variants.

    The kernel's arguments must be in this order: tensors, then numbers that Triton does not specialise, then constants.
    """

    def __init__(self, kernel: Any) -> None:
        """Stores the kernel without compiling it.

        Args:
            kernel: function decorated with `triton.jit`.
        """
        self.kernel = kernel
        self.name: str = kernel.__name__
        """Name of the kernel."""
        self._variants: dict[Hashable, dict[Hashable, _Variant]] = {}

    def prepare(
        self,
        grid: tuple[int, ...],
        numbers: Sequence[int],
        constants: Sequence[Any],
        *,
        num_warps: int,
        num_stages: int = 3,
    ) -> Launch:
        """Returns a `Launch` with fixed grid and scalar arguments. Callers may keep the `Launch` for later calls.

        All calls of the `Launch` must pass tensors of the same dtypes and sizes.

        Args:
            grid: number of Triton programs along each of one to three axes.
            numbers: integer arguments after the tensors. Each fits into 32 bits and is listed in `do_not_specialize`.
            constants: values of the constexpr arguments, which come after the numbers.
            num_warps: warps per Triton program.
            num_stages: number of loop steps whose memory loads overlap (software pipelining).
        """
        variants = self._variants.setdefault((num_warps, num_stages, *constants), {})
        options = {"num_warps": num_warps, "num_stages": num_stages}
        return Launch(self.kernel, grid, (*numbers, *constants), options, variants)


class Tuner:
    """Chooses the fastest settings of a kernel for each dtype and size, by timing candidates at the first launch."""

    def __init__(self) -> None:
        """Starts without any choices."""
        self._chosen: dict[Hashable, Any] = {}

    def choose(
        self,
        case: tuple[Hashable, ...],
        settings: Callable[[], Sequence[_Settings]],
        launch: Callable[[_Settings], None],
    ) -> _Settings:
        """Returns the settings with which `launch` is fastest on the current device.

        Args:
            case: key with everything that affects the speed: kernel, dtypes, constants, and the number of rows as
                `row_class` returns it.
            settings: function that returns the candidate settings.
            launch: function that launches the kernel with given settings; may be called many times.

        Raises:
            TritonError: if the kernel cannot be launched with any of the settings.
        """
        key = drivers.active.get_current_device(), *case
        chosen = self._chosen.get(key)
        if chosen is None:
            chosen = self._chosen[key] = _fastest(settings(), launch)
        found: _Settings = chosen
        return found


class TunedLaunch:
    """Launches a kernel with its fastest settings, which the first call chooses.

    The tensors of all calls have the same dtypes and sizes.
    """

    def __init__(
        self,
        case: tuple[Hashable, ...],
        settings: Callable[[], Sequence[_Settings]],
        prepare: Callable[[_Settings], Launch],
        *,
        is_empty: bool,
    ) -> None:
        """Stores the arguments without launching anything.

        Args:
            case: see `Tuner.choose`.
            settings: function that returns the candidate settings.
            prepare: function that returns the launch with given settings.
            is_empty: whether there is nothing to compute, so that calls launch nothing.
        """
        self._case, self._settings, self._prepare, self._is_empty = case, settings, prepare, is_empty
        self._launch: Launch | None = None

    def __call__(self, *tensors: Tensor) -> None:
        """Launches the kernel; arguments as for `Launch`."""
        if self._is_empty:
            return
        assert all(map(Tensor.is_contiguous, tensors)), "the kernels' strides are those of contiguous tensors"
        launch = self._launch
        if launch is None:
            launch = self._launch = self._choose(tensors)
        launch(*tensors)

    def _choose(self, tensors: tuple[Tensor, ...]) -> Launch:
        """Returns the launch with the fastest settings. A CPU uses the first settings."""
        if not is_on_gpu(tensors[0]):
            return self._prepare(self._settings()[0])
        return self._prepare(_TUNER.choose(self._case, self._settings, lambda one: self._prepare(one)(*tensors)))


_TUNER = Tuner()


def row_class(num_rows: int) -> int:
    """Returns the logarithm to base 2 of a row count, rounded up and at least 11.

    `Tuner` measures once per result of this function: for up to 2048 rows, for 2049 to 4096 rows, and so on.
    """
    return max(_LEAST_ROW_CLASS, (num_rows - 1).bit_length())


def _fastest(settings: Sequence[_Settings], launch: Callable[[_Settings], None]) -> _Settings:
    if len(settings) == 1:
        return settings[0]
    benchmark = drivers.active.get_benchmarker()
    milliseconds: list[tuple[float, int]] = []
    errors: list[TritonError] = []
    for index, one in enumerate(settings):
        try:
            time = benchmark(partial(launch, one), warmup=5, rep=20, return_mode="median")
            milliseconds.append((time, index))
        except TritonError as error:  # raised by the compiler, or because shared memory is too small
            errors.append(error)
    if not milliseconds:
        raise errors[0]
    return settings[min(milliseconds)[1]]
