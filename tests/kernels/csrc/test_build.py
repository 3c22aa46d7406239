"""Tests that setup.py builds the CUDA C++ kernels on request, and names missing tools."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    environment = {**os.environ, "BEIT3_BUILD_CUDA": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_missing_compiler_is_named(tmp_path: Path) -> None:
    result = build(tmp_path, CUDA_HOME=str(tmp_path))
    assert result.returncode == 1
    assert f"BEIT3_BUILD_CUDA=1 needs the CUDA toolkit, but CUDA_HOME={tmp_path} has no nvcc" in result.stderr


LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
operators = torch.ops.beit3_ds_cuda
print(operators.grouped_gemm.default._schema)
print(operators.packed_attention.default._schema)
x = torch.zeros(8, 8, dtype=torch.bfloat16)
tiles = torch.tensor([[0, 0, 8]], dtype=torch.int32)
try:
    operators.grouped_gemm(x, [x], [x[0]], tiles, 128, True)
except NotImplementedError as error:
    print("refused" if "'CPU' backend" in str(error) else error)
"""


def find_toolkit() -> Path | None:
    """Returns the folder of nvcc and its headers, from CUDA_HOME or the usual places, or None."""
    places = (Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path("/usr/local/cuda"))
    return next((place for place in places if (place / "include" / "cuda_runtime.h").exists()), None)


@pytest.mark.slow
@pytest.mark.skipif(find_toolkit() is None, reason="no CUDA toolkit: the CUDA C++ kernels are not built")
def test_extension_builds_and_registers_its_operators(tmp_path: Path) -> None:
    result = build(tmp_path, MAX_JOBS="2", CUDA_HOME=str(find_toolkit()))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (library,) = (tmp_path / "lib" / "beit3_ds" / "kernels").glob("cuda_operators*.so")
    loaded = subprocess.run([sys.executable, "-c", LOAD, library], capture_output=True, text=True)
    gemm, attention, cpu = loaded.stdout.splitlines()
    assert gemm.startswith("beit3_ds_cuda::grouped_gemm(Tensor x, Tensor[] weights, Tensor[] biases, Tensor tiles")
    assert attention.startswith("beit3_ds_cuda::packed_attention(Tensor q, Tensor k, Tensor v, Tensor sequences")
    assert cpu == "refused"
