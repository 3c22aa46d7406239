"""Describes this machine: devices, versions of drivers and packages, missing packages, and this project's commit."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from beit3_ds.benchmarks.certify.recorder import Recorder

_ROOM = Path(__file__).parents[2]
PACKAGES = (
    *("torch", "triton", "numpy", "deepspeed", "torchscale", "timm", "zstandard", "webdataset", "sentencepiece"),
    *("flash_attn", "liger_kernel", "apex", "pytest"),
)
"""Packages whose versions the report lists."""


def measure(recorder: Recorder) -> None:
    """Records a description of the machine. Every call of `beit3 certify` records the description again."""
    recorder.add("machine", **describe_machine())


def describe_machine() -> dict[str, Any]:
    """Returns devices, versions, missing packages and the commit, by name."""
    import torch

    versions = {name: _version(name) for name in PACKAGES}
    from beit3_ds.kernels.triton.architecture import EMULATED

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if EMULATED.architecture is not None:
        devices = [torch.cuda.get_device_name()]
    return {
        "devices": devices or [f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"],
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
        "absent": [name for name, version in versions.items() if not version],
        "commit": _output("git", "rev-parse", "HEAD") + (" (changed)" if _output("git", "status", "--short") else ""),
        "source": _source_hash(),
    }


def _version(package: str) -> str | None:
    """Returns the version of a package; None if the package is not installed."""
    try:
        if importlib.util.find_spec(package) is None:
            return None
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
    except ImportError:
        return None


def _source_hash() -> str:
    """Returns a hash of this project's Python files, which identifies the code if there is no git repository."""
    digest = hashlib.sha256()
    for path in sorted([*_ROOM.rglob("*.py"), *(_ROOM / "kernels").rglob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _output(*command: str) -> str:
    """Returns the output of a command; "unknown" if the command fails."""
    try:
        done = subprocess.run(command, cwd=_ROOM, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
