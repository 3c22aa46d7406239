"""Replaces the GPU by a driver that runs nothing, so that launches of kernels work on a machine without a GPU.

Inside `fake_gpu` the operators treat CPU tensors as tensors of a GPU: they launch Triton kernels, whose results are
undefined. There are two uses:

* `fake_gpu(90, compiles=False)` measures the time that Python needs to launch the kernels of a layer or a step. Nothing
  is compiled.
* `fake_gpu(90, compiles=True)` fills Triton's cache (`TRITON_CACHE_DIR`) ahead of time: every launch compiles its
  kernel, or finds it in the cache. The keys of the cache are those of a launch on such a GPU with the same version of
  Triton. The self-checks of the operators also run and compile.

Example:
    with fake_gpu(90, compiles=True) as gpu:
        model(batch).sum().backward()  # parameters and batch on the CPU, with the dtypes and sizes of the training
    print(gpu.launches.total(), len(gpu.kernels))
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as drivers
from triton.runtime.jit import JITFunction

from beit3_ds.kernels.ops.measured_op import CHOICES
from beit3_ds.kernels.ops.self_check import TrustedKernels
from beit3_ds.kernels.triton.architecture import EMULATED
from beit3_ds.kernels.triton.launchers import store_launcher

_SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Maximum bytes of shared memory per program, by architecture."""


class FakeGPU:
    """Counts what was launched and compiled for an emulated GPU. Triton uses it as its driver."""

    def __init__(self, architecture: int) -> None:
        """Sets all counts to 0.

        Args:
            architecture: 80 for an A100, 90 for an H100 or H200, 100 for a B200.
        """
        self.architecture = architecture
        self.launches: Counter[str] = Counter()
        """Number of launches, by name of the kernel."""
        self.kernels: set[str] = set()
        """Keys in Triton's cache of all kernels that were launched; empty if launches do not compile."""
        self.num_launchers = 0
        """Number of launchers that were built into Triton's cache (`launchers`)."""
        self.utils = self
        """Triton asks this attribute of a driver to load machine code."""
        self._device = object()  # Triton keeps kernels per device, so these kernels are used by this object alone

    def get_current_target(self) -> GPUTarget:
        """Returns the target of compilations."""
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> Hashable:
        """Returns the key under which Triton keeps compiled kernels."""
        return self._device

    def get_current_stream(self, device: Hashable) -> int:
        """Returns the default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Returns the CPU, where all tensors are."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., Any]:
        """Returns a function that calls a kernel once and reports a time of 1 ms."""

        def benchmark(call: Callable[[], Any], *, quantiles: Any = None, **options: Any) -> Any:
            call()
            return 1.0 if quantiles is None else [1.0] * len(quantiles)

        return benchmark

    def get_device_properties(self, device: Hashable) -> dict[str, int]:
        """Returns the properties that Triton checks before it loads a kernel."""
        return {"max_shared_mem": _SHARED_MEMORY[self.architecture]}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: Hashable) -> tuple[None, None, int, int, int]:
        """Loads nothing. Returns module, function, registers, spills, and the maximum threads per program."""
        return None, None, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Returns a function that counts a launch of a compiled kernel; stores the launcher that a GPU would need."""
        self.kernels.add(metadata.hash)
        self.num_launchers += store_launcher(source, metadata)
        return _Launcher(self.launches, metadata.name)


class _Launcher:
    def __init__(self, launches: Counter[str], name: str) -> None:
        self._launches, self._name = launches, name

    def __call__(self, *arguments: Any) -> None:
        self._launches[self._name] += 1


class _EmptyKernel:
    """Takes the place of a compiled kernel; a launch does nothing but count."""

    function = packed_metadata = None

    def __init__(self, launches: Counter[str], name: str) -> None:
        self.run = _Launcher(launches, name)

    def launch_metadata(self, *arguments: Any) -> None:
        """Returns None, as without a hook that observes launches."""


@contextmanager
def fake_gpu(architecture: int, *, compiles: bool) -> Iterator[FakeGPU]:
    """Treats CPU tensors as tensors of a GPU inside a `with` block, and launches nothing (see the top of this file).

    The backend is `triton`; `use_backend` or `CHOICES.fixed` may set another one inside. Other threads see the emulated
    GPU too.

    Args:
        architecture: architecture of the GPU, 80, 90 or 100.
        compiles: whether launches compile their kernels; otherwise only their time in Python is spent.

    Yields:
        The counts of launches and compilations.
    """
    gpu = FakeGPU(architecture)
    verdicts: dict[Hashable, bool] = {}

    def are_trusted(self: Any, device: torch.device, dtype: torch.dtype, **properties: Hashable) -> bool:
        key = self, device, dtype, *sorted(properties.items())
        if compiles and key not in verdicts:
            verdicts[key] = True  # first, because a check runs operators that ask again
            with CHOICES.fixed("triton"), torch.inference_mode(False), torch.enable_grad():
                try:
                    self._check(device, dtype, **properties)
                except NotImplementedError:  # an operator of a library that has no form for CPU tensors
                    verdicts[key] = False
        return verdicts.get(key, True)

    def keep_empty_kernel(self: Any, key: Hashable, signature: Any, device: Hashable, *rest: Any) -> _EmptyKernel:
        kernel = self.device_caches[device][0][key] = _EmptyKernel(gpu.launches, self.__name__)
        return kernel

    with ExitStack() as stack:
        stack.enter_context(EMULATED.set(architecture))
        stack.enter_context(CHOICES.fixed("triton"))
        stack.enter_context(mock.patch.object(drivers, "_active", gpu))
        stack.enter_context(mock.patch.object(TrustedKernels, "are_trusted", are_trusted))
        if not compiles:
            stack.enter_context(mock.patch.object(JITFunction, "_do_compile", keep_empty_kernel))
        stack.callback(_run_gpu_implementations_on_cpu()._destroy)
        yield gpu


def _run_gpu_implementations_on_cpu() -> torch.library.Library:
    """Runs GPU implementations of this project's operators for CPU tensors, until the result is destroyed."""
    library = torch.library.Library("beit3_ds", "IMPL", "CPU")
    for name in torch._C._dispatch_get_all_op_names():
        is_ours = name.startswith("beit3_ds::")
        if is_ours and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            implementation = torch.library.get_kernel(name, "CUDA").call_boxed
            library.impl(name.removeprefix("beit3_ds::"), implementation, with_keyset=True, allow_override=True)
    return library
