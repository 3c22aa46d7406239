"""Installs `beit3_ds`, whose package `beit3_ds.kernels` is a link to the folder `kernels/`.

A top-level module named `kernels` would shadow a package that transformers looks for. Nothing is compiled unless
`BEIT3_BUILD_CUDA=1` asks for the kernels in CUDA C++ (docs/kernels_cuda.md).
"""

import os
from typing import Any

from setuptools import find_packages, setup


def cuda_kernels() -> dict[str, Any]:
    """Returns the arguments of `setup` that build `kernels/csrc` with nvcc; none unless `BEIT3_BUILD_CUDA=1`."""
    if os.environ.get("BEIT3_BUILD_CUDA", "0") != "1":
        return {}
    try:
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CUDAExtension
    except ImportError:
        raise SystemExit(
            "BEIT3_BUILD_CUDA=1 builds against the torch that is installed, which pip hides from a build. Install this "
            "package without it first, and then again with it: BEIT3_BUILD_CUDA=1 pip install --no-build-isolation ."
        ) from None
    # Without CUDA_HOME torch takes the folder above that of nvcc, which may be a script in /usr/local/bin.
    if not all(os.path.exists(f"{CUDA_HOME}/{part}") for part in ("bin/nvcc", "include/cuda_runtime.h")):
        raise SystemExit(
            f"BEIT3_BUILD_CUDA=1 needs the CUDA toolkit, but CUDA_HOME={CUDA_HOME} has no nvcc or no header files. "
            "Install the toolkit of torch's version (torch.version.cuda) and set CUDA_HOME to it, or leave "
            "BEIT3_BUILD_CUDA out: Triton's kernels need no build."
        )
    # The kernels use nothing that came after sm_80; its code runs on 8.x, that of 9.0 is tuned for it, and its PTX is
    # compiled by the driver of anything newer.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    sources = [f"kernels/csrc/{name}" for name in ("ops.cpp", "grouped_gemm.cu", "packed_attention.cu")]
    extension = CUDAExtension("beit3_ds.kernels.cuda_operators", sources)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(packages=find_packages(include=["beit3_ds", "beit3_ds.*"]), **cuda_kernels())
