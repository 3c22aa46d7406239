"""Compiles the headers of the CUDA C++ kernels for the CPU with g++ and its sanitizers.

The address and undefined-behaviour sanitizers are enabled. `emulation.cuh` replaces `kernels/csrc/primitives.cuh`; all
other files are compiled as for a GPU, or with one deliberate mistake.
"""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
SOURCES = Path(__file__).parents[3] / "kernels" / "csrc"
ELEMENTS = {torch.bfloat16: "beit3::BFloat16", torch.float16: "beit3::Float16"}
FLAGS = ["-std=c++17", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
RIGHT = ["-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
WRONG = ["-O0"]
"""Compiler options for deliberate mistakes: no optimisation, to save time, and no warnings, like nvcc."""

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++: the kernels' headers run under it here"
)


class Mistake(NamedTuple):
    """Describes a deliberate mistake in a kernel's header."""

    header: str
    right: str
    """Original text, which occurs once in the header."""
    wrong: str
    """Text that replaces the original."""
    finding: str
    """Regular expression that the reported error must match."""
    is_slow: bool = False
    """Whether only slow tests make the mistake."""


def parameters(mistakes: Mapping[str, Mistake]) -> list[Any]:
    """Returns mistakes as arguments of `pytest.mark.parametrize`, by name."""
    return [pytest.param(m, id=name, marks=pytest.mark.slow if m.is_slow else ()) for name, m in mistakes.items()]


class FailedError(RuntimeError):
    """Reports that a sanitizer or the emulation ended a program; the message is the program's output."""


def build(folder: Path, program: str, definition: str, mistake: Mistake | None = None) -> Path:
    """Compiles a program of this folder with the kernels' headers; returns the executable.

    Args:
        folder: empty folder for the program.
        program: name of the source file, without .cpp.
        definition: macro NAME=VALUE that selects the kernel.
        mistake: deliberate mistake to make in the headers, or None.
    """
    for header in (*SOURCES.glob("*.cuh"), SOURCES / "arguments.h"):
        shutil.copy(header, folder)
    shutil.copy(HERE / "emulation.cuh", folder / "primitives.cuh")
    if mistake is not None:
        text = (folder / mistake.header).read_text(encoding="utf-8")
        assert text.count(mistake.right) == 1, f"{mistake.header} has not one {mistake.right!r}: mend the test"
        (folder / mistake.header).write_text(text.replace(mistake.right, mistake.wrong), encoding="utf-8")
    executable = folder / program
    command = ["g++", *FLAGS, *(WRONG if mistake else RIGHT), f"-D{definition}", f"-I{folder}", f"-I{HERE}"]
    subprocess.run([*command, HERE / f"{program}.cpp", "-o", executable], check=True)
    return executable


def run(executable: Path, folder: Path, arrays: Mapping[str, torch.Tensor], *arguments: int) -> None:
    """Runs a program on raw binary files.

    Args:
        executable: program from `build`.
        folder: folder for the files.
        arrays: tensors by file name.
        arguments: arguments of the program, after the folder.

    Raises:
        FailedError: if the program reported an error.
    """
    for name, tensor in arrays.items():
        bits = tensor.view(torch.int16) if tensor.dtype in ELEMENTS else tensor
        np.ascontiguousarray(bits.numpy()).tofile(folder / name)
    command = [str(executable), str(folder), *(str(int(argument)) for argument in arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if result.returncode:
        raise FailedError(result.stderr[:4000])


def read(path: Path, like: torch.Tensor) -> torch.Tensor:
    """Reads a tensor from a raw binary file, with the shape and dtype of `like`."""
    bits = np.fromfile(path, np.int16 if like.dtype in ELEMENTS else np.float32)
    return torch.from_numpy(bits).view(like.dtype).view(like.shape)
