"""Tests registers, spills, tensor cores and asynchronous copies of kernels/csrc, as compiled by nvcc."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import triton

SOURCES = Path(__file__).parents[3] / "kernels" / "csrc"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS = {"grouped_gemm": 240, "packed_attention": 232}
"""Largest number of registers per thread: a little more than the measured number."""
NUM_KERNELS = {"grouped_gemm": 2, "packed_attention": 12}

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: the CUDA C++ kernels are not compiled")


class MachineCode(NamedTuple):
    """Lists properties of one kernel's machine code."""

    registers: int
    stack: int
    code: str


def compile_kernels(source: Path, architecture: str, folder: Path) -> dict[str, MachineCode]:
    """Compiles a .cu file without torch; returns the properties of its kernels by mangled name."""
    cubin = folder / "kernels.cubin"
    command = ["nvcc", "-std=c++17", "-cubin", f"-arch={architecture}", str(source), "-o", str(cubin)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    usage, code = (
        subprocess.run([TOOLS / tool, option, cubin], check=True, capture_output=True, text=True).stdout
        for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
    )
    sections = re.split(r"^\s*\.section\s+\.text\.(\w+),.*$", code, flags=re.MULTILINE)
    codes = dict(zip(sections[1::2], sections[2::2], strict=True))
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", usage)
    return {name: MachineCode(int(registers), int(stack), codes[name]) for name, registers, stack in found}


@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        ("grouped_gemm", "sm_80"),
        *(
            pytest.param(source, architecture, marks=pytest.mark.slow)
            for source, architecture in (
                ("grouped_gemm", "sm_90a"),
                ("grouped_gemm", "sm_100"),
                ("packed_attention", "sm_80"),
                ("packed_attention", "sm_90a"),
                ("packed_attention", "sm_100"),
            )
        ),
    ],
)
def test_kernels_compile_as_intended(source: str, architecture: str, tmp_path: Path) -> None:
    kernels = compile_kernels(SOURCES / f"{source}.cu", architecture, tmp_path)
    assert len(kernels) == NUM_KERNELS[source]
    check_kernels(kernels, REGISTERS[source])


GIANT = "beit3::PackedAttention<beit3::BFloat16, 128, 64, 96, 2>"


def test_attention_of_giant_compiles_as_intended(tmp_path: Path) -> None:
    """Compiles one of the twelve kernels of packed_attention.cu for the larger GPUs."""
    source = tmp_path / "giant.cu"
    argument = f"const __grid_constant__ {GIANT}::Arguments"
    source.write_text(
        f'#include "{SOURCES / "packed_attention.cuh"}"\n'
        f"template __global__ void beit3::packed_attention_kernel<{GIANT}>({argument});\n"
    )
    kernels = compile_kernels(source, "sm_90a", tmp_path)
    assert len(kernels) == 1
    check_kernels(kernels, REGISTERS["packed_attention"])


def check_kernels(kernels: dict[str, MachineCode], most_registers: int) -> None:
    for name, (registers, stack, code) in kernels.items():
        assert registers <= most_registers, f"{name} uses {registers} registers"
        assert stack == 0, f"{name} spills"
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name} uses local memory"
        for instruction in ("HMMA", "LDGSTS", "LDSM", "BAR"):
            assert re.search(rf"\b{instruction}\b", code), f"{name} has no {instruction}"


def test_headers_include_no_torch() -> None:
    """Catches headers that include torch; without it, nvcc compiles them in seconds."""
    for path in SOURCES.iterdir():
        includes = re.findall(r'#include\s+[<"](.*?)[>"]', path.read_text(encoding="utf-8"))
        foreign = [name for name in includes if re.match(r"torch|ATen|c10", name)]
        assert not foreign or path.name == "ops.cpp", f"{path.name} includes {foreign}"
