"""Stores which implementation of each operator is fastest, in one JSON file per GPU model and set of software versions.

A case is the text that identifies one measurement: the operator's name, and the dtypes, sizes and flags of the
arguments. A file has one line per case: {"CASE": {"fastest": NAME, "milliseconds": {NAME: MS, ...}}, ...}. The file
shipped with the package (`kernels/choices`) is read first. Then the file of this machine is read from Triton's cache
folder. If both files have a case, the file of this machine counts.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

SHIPPED = Path(__file__).parents[1] / "choices"
"""Folder of the lists that are shipped with the package. Each file lists the fastest implementations for one GPU model
and one set of software versions."""


class ChoiceFile:
    """Reads and extends the list of fastest implementations on one device.

    If the file of the list cannot be read or written, the implementations are measured again.
    """

    def __init__(self, name: str, folder: Path | None, shipped: Path = SHIPPED) -> None:
        """Reads the file shipped with the package, then the file of this machine.

        Args:
            name: name of the two files, for example from `file_name`.
            folder: folder of this machine's file. With None, new choices are kept in memory only.
            shipped: folder of the shipped file.
        """
        self.path = None if folder is None else folder / name
        self._cases = _read(shipped / name)
        if self.path is not None:
            self._cases |= _read(self.path)

    def find(self, case: str) -> str | None:
        """Returns the name of the fastest implementation for a case; None if the case has not been measured."""
        return self._cases[case]["fastest"] if case in self._cases else None

    def add(self, case: str, fastest: str, milliseconds: Mapping[Any, float]) -> None:
        """Adds a measurement to this machine's file.

        Other processes may also have extended the file. So the file is read again, and then replaced as a whole. If two
        processes write at once, one measurement is lost. A later run repeats the lost measurement.

        Args:
            case: text that identifies the operator and the arguments.
            fastest: name of the fastest implementation.
            milliseconds: milliseconds per call of each implementation, by name.
        """
        measured = {name: round(ms, 4) for name, ms in milliseconds.items()}
        self._cases[case] = {"fastest": fastest, "milliseconds": measured}
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self.path, _read(self.path) | {case: self._cases[case]})
        except OSError as error:
            warnings.warn(
                f"the choice of kernels is kept in memory only, because {self.path} cannot be written: {error}",
                stacklevel=2,
            )
            self.path = None


def choice_file_of(device: torch.device) -> ChoiceFile:
    """Opens the list of fastest implementations for a CUDA device and the installed software versions."""
    import triton  # needed on a GPU only

    return ChoiceFile(file_name(torch.cuda.get_device_name(device)), Path(triton.knobs.cache.dir) / "beit3_ds")


def file_name(device: str) -> str:
    """Returns the name of the file that lists the fastest implementations on a device.

    The name contains the versions of torch, Triton and this package. Example:
    "nvidia_h200-torch2.14.1-triton3.8.0-beit3_ds0.2.0.json".
    """
    versions = [f"{name}{_version(name)}" for name in ("torch", "triton", "beit3_ds")]
    return re.sub(r"[^a-z0-9_.+-]+", "_", "-".join([device, *versions]).lower()) + ".json"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "0"


def _read(path: Path) -> dict[str, Any]:
    """Returns a file's valid measurements, by case; returns an empty dict if the file is missing or invalid."""
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{path} is ignored, and operators are measured again: {error}", stacklevel=2)
        return {}
    return {case: found for case, found in cases.items() if _is_valid(found)} if isinstance(cases, dict) else {}


def _is_valid(found: Any) -> bool:
    return isinstance(found, dict) and isinstance(found.get("fastest"), str)


def _replace(path: Path, cases: Mapping[str, Any]) -> None:
    lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(cases[case])}" for case in sorted(cases))
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(f"{{\n{lines}\n}}\n")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
