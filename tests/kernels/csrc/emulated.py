"""The CUDA C++ kernels' headers compiled for the CPU by g++, under the address and undefined-behaviour sanitizers.

`emulation.cuh` stands in for `kernels/csrc/primitives.cuh`; all else is compiled as it is for a GPU, or with one
planted mistake.
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
"""A planted mistake is compiled in half the time, and without warnings, for nvcc would give none either."""

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++: the kernels' headers run under it here"
)


class Mistake(NamedTuple):
    """A mistake to plant in a kernel's header."""

    header: str
    right: str
    """What stands there, once."""
    wrong: str
    """What the mistake makes of it."""
    finding: str
    """What must be said of it, a regular expression."""
    is_slow: bool = False
    """Whether only the slow tests plant it."""


def parameters(mistakes: Mapping[str, Mistake]) -> list[Any]:
    """For `pytest.mark.parametrize`, by name."""
    return [pytest.param(m, id=name, marks=pytest.mark.slow if m.is_slow else ()) for name, m in mistakes.items()]


class FailedError(RuntimeError):
    """A program was ended by a sanitizer or by the emulation; the text is what it said."""


def build(folder: Path, program: str, definition: str, mistake: Mistake | None = None) -> Path:
    """Compiles a program of this folder against the kernels' headers.

    Args:
        folder: where to; empty.
        program: name of its source, without .cpp.
        definition: one macro, NAME=VALUE, that says which kernel.
        mistake: what to change in the headers first.
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
    """Runs a program on raw files.

    Args:
        executable: from `build`.
        folder: where the files are written.
        arrays: tensors by file name.
        arguments: of the program, after the folder.

    Raises:
        FailedError: if the program found a mistake.
    """
    for name, tensor in arrays.items():
        bits = tensor.view(torch.int16) if tensor.dtype in ELEMENTS else tensor
        np.ascontiguousarray(bits.numpy()).tofile(folder / name)
    command = [str(executable), str(folder), *(str(int(argument)) for argument in arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if result.returncode:
        raise FailedError(result.stderr[:4000])


def read(path: Path, like: torch.Tensor) -> torch.Tensor:
    """Reads a tensor of another's shape and dtype from a raw file."""
    bits = np.fromfile(path, np.int16 if like.dtype in ELEMENTS else np.float32)
    return torch.from_numpy(bits).view(like.dtype).view(like.shape)
