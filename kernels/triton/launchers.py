"""Stores C launchers in Triton's cache, so that Triton versions before 3.8 need not compile launchers on a GPU machine.

Triton 3.6 builds one extension module per kernel signature, and one module with utilities. From Triton 3.8 on, there is
one launcher for all kernels, so nothing is stored.
"""

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.nvidia import driver
from triton.runtime import build
from triton.runtime.cache import get_cache_manager

_LIBRARY = "libcuda.so.1"


def store_launcher(source: Any, metadata: Any) -> bool:
    """Builds a kernel's C launcher and the module with utilities, and stores both in Triton's cache.

    This works on a machine without a GPU driver.

    Args:
        source: kernel with its signature and constants, as Triton passes it to a driver's `launcher_cls`.
        metadata: properties of the compiled kernel.

    Returns:
        Whether anything was built. False if the cache already has both modules, or if this Triton version needs none.
    """
    if not hasattr(driver, "make_launcher"):
        return False
    constants = {
        (source.fn.arg_names.index(key),) if isinstance(key, str) else key: value
        for key, value in source.constants.items()
    }
    code = driver.make_launcher(constants, dict(source.signature), getattr(metadata, "tensordesc_meta", None))
    utilities = Path(driver.dirname, "driver.c").read_text()
    return any([_store("__triton_launcher", code), _store("cuda_utils", utilities)])


def _store(name: str, code: str) -> bool:
    folder = get_cache_manager(hashlib.sha256((code + build.platform_key()).encode()).hexdigest())
    file_name = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if folder.get_file(file_name) is not None:
        return False
    with tempfile.TemporaryDirectory() as work:
        path = Path(work, f"{name}.c")
        path.write_text(code)
        libraries, folders = list(driver.libraries), [driver.libdevice_dir, _stub_folder().name]
        built = build._build(name, str(path), work, folders, driver.include_dirs, libraries, [])
        folder.put(Path(built).read_bytes(), file_name, binary=True)
    return True


@cache
def _stub_folder() -> tempfile.TemporaryDirectory[str]:
    """Creates a folder with an empty library for the linker. The library has the name of the GPU driver's library.

    Raises:
        RuntimeError: if no C compiler is installed.
    """
    compiler = next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    if compiler is None:
        raise RuntimeError(f"Triton {triton.__version__} builds launchers with a C compiler: install gcc or clang")
    folder = tempfile.TemporaryDirectory(prefix="libcuda_stub")
    target = os.path.join(folder.name, _LIBRARY)
    command = [compiler, "-shared", "-x", "c", os.devnull, f"-Wl,-soname,{_LIBRARY}", "-o", target]
    subprocess.run(command, check=True, capture_output=True)
    return folder
