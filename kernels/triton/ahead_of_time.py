"""Compiles all Triton kernels without a GPU, and compares properties of the machine code with `budgets.json`.

    python -m beit3_ds.kernels.triton.ahead_of_time            # compare
    python -m beit3_ds.kernels.triton.ahead_of_time --write    # store the properties as new budgets for this Triton

The kernels are compiled for all supported GPU architectures. A budget records registers, spills, shared memory,
tensor-core instructions and the widths of memory accesses. The comparison shows whether a kernel compiles as intended.
It does not show how fast the kernel is.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from beit3_ds.kernels.triton import (
    expert_rows_launch,
    linear_cross_entropy_launch,
    multiway_ffn_launch,
    multiway_layer_norm_launch,
    multiway_qkv_launch,
    packed_attention_launch,
    residual_add_launch,
    sub_norm_launch,
    weight_gradient_launch,
)
from beit3_ds.kernels.triton.budgets import Report, read_budgets, write_budgets
from beit3_ds.kernels.triton.variant import KernelVariant

SOURCES = (
    packed_attention_launch.variants,
    multiway_ffn_launch.variants,
    multiway_qkv_launch.variants,
    weight_gradient_launch.variants,
    sub_norm_launch.variants,
    expert_rows_launch.variants,
    multiway_layer_norm_launch.variants,
    residual_add_launch.variants,
    linear_cross_entropy_launch.variants,
)
"""Functions that return the kernel variants to compile, one function per file of kernels. Each function takes a GPU
architecture (80, 90 or 100). If you add a file of kernels, add its function here, and its budgets to budgets.json."""

ARCHITECTURES = (80, 90, 100)

_SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_TENSOR_CORE = {80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA"}
_ASYNC_COPY = r"LDGSTS|UTMALDG|UBLKCP"
_SPILL = r"LDL|STL"
_GLOBAL_ACCESS = r"\b(?:LDG|STG|LDGSTS)\.[\w.]+"


def all_variants(architecture: int) -> list[KernelVariant]:
    """Returns the variants of all kernels for one GPU architecture (80, 90 or 100)."""
    variants = [variant for source in SOURCES for variant in source(architecture)]
    assert len({variant.name for variant in variants}) == len(variants), "two variants share a name"
    return variants


def compile_variant(variant: KernelVariant, architecture: int) -> Report:
    """Compiles one variant for a GPU architecture, and returns the properties of its machine code."""
    source = ASTSource(
        variant.kernel,
        variant.signature,
        variant.constants,
        # Assumes the alignment of a real launch: PyTorch's allocations are aligned to at least 16 bytes.
        {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(variant.signature.values()) if kind.startswith("*")},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "-res-usage", cubin.name)
        code = _run("nvdisasm", "-c", cubin.name)

    def count(pattern: str) -> int:
        return len(re.findall(rf"\b(?:{pattern})\b", code))

    def used(resource: str) -> int:
        found = re.search(rf"\b{resource}:(\d+)", usage)
        assert found, f"no {resource} in {usage!r}"
        return int(found[1])

    accesses = re.findall(_GLOBAL_ACCESS, code)
    num_wide = sum("128" in access.split(".") for access in accesses)
    return Report(
        registers=used("REG"),
        stack=used("STACK"),
        spills=count(_SPILL),
        shared_memory=compiled.metadata.shared,
        tensor_core=count(_TENSOR_CORE[architecture]),
        async_copies=count(_ASYNC_COPY),
        wide_accesses=num_wide,
        narrow_accesses=len(accesses) - num_wide,
    )


def find_excess(report: Report, budget: Report | None, architecture: int) -> list[str]:
    """Compares new machine code with stored properties and hardware limits; returns one message per problem.

    A problem is a property that is worse than the stored one, shared memory beyond the limit of the hardware, or a
    variant for which nothing is stored.

    Args:
        report: properties of the new machine code.
        budget: stored properties (`budgets.json`); None if nothing is stored for the variant.
        architecture: GPU architecture of the machine code.
    """
    problems = []
    if report.shared_memory > _SHARED_MEMORY[architecture]:
        problems.append(f"shared memory {report.shared_memory} > {_SHARED_MEMORY[architecture]} of sm_{architecture}")
    if budget is None:
        return [*problems, "no budget: run with --write"]
    for name in ("registers", "stack", "spills", "shared_memory", "narrow_accesses"):
        if getattr(report, name) > getattr(budget, name):
            problems.append(f"{name} {getattr(report, name)} > {getattr(budget, name)}")
    # If one of these falls, an operand is no longer copied ahead, a product does not use tensor cores, or Triton
    # silently compiled the kernel to nothing.
    for name in ("tensor_core", "async_copies", "wide_accesses"):
        if getattr(report, name) < getattr(budget, name):
            problems.append(f"{name} {getattr(report, name)} < {getattr(budget, name)}")
    return problems


def main(arguments: list[str] | None = None) -> int:
    """Compiles kernel variants, prints the properties of the machine code, and compares the properties with the
    budgets.

    With the option --write, stores the properties as new budgets instead of comparing them.

    Returns:
        Exit status: 1 if the comparison finds a problem (`find_excess`), else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="store the results as new budgets")
    parser.add_argument("--architecture", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--name", default="", help="only variants whose name contains this")
    options = parser.parse_args(arguments)
    budgets = read_budgets(triton.__version__)
    reports: dict[tuple[str, int], Report] = {}
    excess = []
    print("| variant | sm | " + " | ".join(Report._fields) + " |", "|---" * (2 + len(Report._fields)) + "|", sep="\n")
    for variant, architecture in _selected(options.architecture, options.name):
        key = variant.name, architecture
        reports[key] = compile_variant(variant, architecture)
        print(f"| {variant.name} | {architecture} | " + " | ".join(map(str, reports[key])) + " |", flush=True)
        excess += [f"{key}: {problem}" for problem in find_excess(reports[key], budgets.get(key), architecture)]
    if options.write:
        known = {(variant.name, architecture) for variant, architecture in _selected(ARCHITECTURES, "")}
        write_budgets(triton.__version__, {key: report for key, report in (budgets | reports).items() if key in known})
        return 0
    print("\n".join(excess), file=sys.stderr)
    return 1 if excess else 0


def _selected(architectures: Iterable[int], name: str) -> list[tuple[KernelVariant, int]]:
    return [(v, architecture) for architecture in architectures for v in all_variants(architecture) if name in v.name]


def _run(tool: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
