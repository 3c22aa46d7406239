"""Emulates a GPU with a fake Triton driver, so that kernels can be launched on a machine without a GPU.

Inside `fake_gpu`, operators treat CPU tensors as GPU tensors and launch Triton kernels. The kernels do not run, so all
results are undefined. There are two uses:

* `fake_gpu(90, compiles=False)` helps to measure the time that Python needs to launch the kernels of a layer or a step.
  No kernel is compiled.
* `fake_gpu(90, compiles=True)` fills Triton's cache (`TRITON_CACHE_DIR`) ahead of time. Every launch compiles its
  kernel, or finds the kernel in the cache. The cache keys are those of a GPU of architecture 90 with the installed
  version of Triton. Operators check their kernels before the first use. The kernels that these checks launch are
  compiled too.

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
"""Maximum bytes of shared memory per Triton program (thread block), by GPU architecture."""


class FakeGPU:
    """Acts as Triton's driver for an emulated GPU. Counts launches and compilations."""

    def __init__(self, architecture: int) -> None:
        """Sets all counts to 0.

        Args:
            architecture: GPU architecture: 80 for an A100, 90 for an H100 or H200, 100 for a B200.
        """
        self.architecture = architecture
        self.launches: Counter[str] = Counter()
        """Number of launches by kernel name."""
        self.kernels: set[str] = set()
        """Cache keys of all launched kernels; always empty with `fake_gpu(compiles=False)`, because kernels that are
        not compiled have no keys."""
        self.num_launchers = 0
        """Number of C launchers that were added to Triton's cache (see the module `launchers`)."""
        self.utils = self
        """Object with functions that Triton calls to load machine code."""
        self._device = object()  # Triton keeps kernels per device, so these kernels are used by this object alone

    def get_current_target(self) -> GPUTarget:
        """Returns the architecture for which Triton compiles."""
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> Hashable:
        """Returns the key under which Triton keeps the compiled kernels of a device."""
        return self._device

    def get_current_stream(self, device: Hashable) -> int:
        """Returns 0, the default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Returns the CPU, because all tensors are on the CPU."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., Any]:
        """Returns a benchmark function, which calls a kernel once and returns 1 ms as the kernel's time."""

        def benchmark(call: Callable[[], Any], *, quantiles: Any = None, **options: Any) -> Any:
            call()
            return 1.0 if quantiles is None else [1.0] * len(quantiles)

        return benchmark

    def get_device_properties(self, device: Hashable) -> dict[str, int]:
        """Returns the device properties that Triton checks before it loads a kernel."""
        return {"max_shared_mem": _SHARED_MEMORY[self.architecture]}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: Hashable) -> tuple[None, None, int, int, int]:
        """Returns placeholders for what Triton's driver returns for a loaded kernel, but loads no kernel.

        The placeholders stand for the module and the function (both None), the number of registers, the number of
        spills, and the maximum number of threads per program.
        """
        return None, None, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Returns a function that counts the launches of a compiled kernel.

        Also stores the C launcher that the kernel needs on a GPU (see the module `launchers`).
        """
        self.kernels.add(metadata.hash)
        self.num_launchers += store_launcher(source, metadata)
        return _Launcher(self.launches, metadata.name)


class _Launcher:
    def __init__(self, launches: Counter[str], name: str) -> None:
        self._launches, self._name = launches, name

    def __call__(self, *arguments: Any) -> None:
        self._launches[self._name] += 1


class _EmptyKernel:
    """Replaces a compiled kernel. A launch only increases the kernel's count."""

    function = packed_metadata = None

    def __init__(self, launches: Counter[str], name: str) -> None:
        self.run = _Launcher(launches, name)

    def launch_metadata(self, *arguments: Any) -> None:
        """Returns None. Triton passes this value to hooks that observe launches."""


@contextmanager
def fake_gpu(architecture: int, *, compiles: bool) -> Iterator[FakeGPU]:
    """Makes operators treat CPU tensors as GPU tensors inside a `with` block; no kernel runs.

    The backend is `triton`, unless `use_backend` or `CHOICES.fixed` sets another one inside the block. The block also
    affects other threads of the process. The module's docstring describes two uses.

    Args:
        architecture: architecture of the emulated GPU: 80, 90 or 100.
        compiles: whether launches compile their kernels.

    Yields:
        The emulated GPU, which counts launches and compilations.
    """
    gpu = FakeGPU(architecture)
    verdicts: dict[Hashable, bool] = {}

    def are_trusted(self: Any, device: torch.device, dtype: torch.dtype, **properties: Hashable) -> bool:
        key = self, device, dtype, *properties.items()
        if compiles and key not in verdicts:
            verdicts[key] = True  # set first: the check runs operators, which look up this key again
            with CHOICES.fixed("triton"), torch.inference_mode(False), torch.enable_grad():
                try:
                    self._check(device, dtype, **properties)
                except NotImplementedError:  # a library's operator that does not take CPU tensors
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
        yield gpu
