"""Tests the bundle for machines without network: its parts, its script and its size limit."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from beit3_ds.benchmarks import bundle
from beit3_ds.config import ConfigError


def fetch(requirements: Sequence[str], folder: Path) -> None:
    """Stores one wheel per requirement, each with a single module."""
    for requirement in requirements:
        name = requirement.split("==")[0].replace("-", "_")
        with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}_of_the_bundle.py", "")


def fill(tree: Path, cache: Path, architecture: int) -> None:
    """Stores one kernel with one file, as Triton does."""
    assert (tree / "beit3_ds" / "kernels" / "triton").is_dir()
    kernel = cache / "KEY" / f"kernel_{architecture}"
    kernel.parent.mkdir()
    kernel.write_bytes(b"0" * 100)
    (kernel.parent / "__grp__kernel.json").write_text(json.dumps({"child_paths": {kernel.name: str(kernel)}}))


def test_the_script_runs_the_tree_with_cache_and_packages(tmp_path: Path) -> None:
    """Catches a missing part, and a script that uses packages, code or a cache from outside the bundle.

    Triton finds no kernels in a cache that was packed in another folder, unless the script corrects their paths.
    """
    size = bundle.pack_bundle(tmp_path / "packed", 90, fetch, fill)
    folder = (tmp_path / "packed").rename(tmp_path / "bundle")
    assert 1e6 < size < bundle.MAX_BYTES and size == bundle._size(folder)
    assert not (folder / "tree" / ".git").exists() and (folder / "tree" / "constraints.txt").exists()
    assert len(list((folder / "wheels").iterdir())) == len(bundle.PACKAGES)
    # Takes the place of Python: it reports what it would run, and where.
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$2" in zipfile | tarfile | *.moved_cache) exec {sys.executable} "$@" > {tmp_path}/unpacked ;; esac
echo "$@" > {tmp_path}/arguments
pwd >> {tmp_path}/arguments
echo "$TRITON_CACHE_DIR" >> {tmp_path}/arguments
exec {sys.executable} -c "import deepspeed_of_the_bundle, beit3_ds; print(beit3_ds.__file__)"
"""
    )
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python)}
    for _ in range(2):  # the second finds the packages unpacked
        command = [folder / "certify", "--minutes", "10"]
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(folder / "tree" / "beit3_ds" / "__init__.py")
        arguments, where, cache = (tmp_path / "arguments").read_text().splitlines()
        assert arguments == f"-m beit3_ds.cli.main certify --out {folder}/certificate --minutes 10"
        kernel = folder / "triton_cache" / "KEY" / "kernel_90"
        paths = json.loads((kernel.parent / "__grp__kernel.json").read_text())["child_paths"]
        assert kernel.stat().st_size == 100 and paths == {"kernel_90": str(kernel)}
        assert where == str(folder / "tree") and cache == str(folder / "triton_cache")


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"exists\. Name a new folder"):
        bundle.pack_bundle(tmp_path, 90, fetch, fill)
    monkeypatch.setattr(bundle, "MAX_BYTES", 2**20)
    with pytest.raises(ConfigError, match=r"larger than 1 MiB: .*tree [\d.]+"):
        bundle.pack_bundle(tmp_path / "large", 90, fetch, fill)


def test_packages_are_pinned() -> None:
    """Catches a package whose version is not pinned to a tested one."""
    requirements = bundle.pinned(bundle.ROOT / "constraints.txt")
    assert len(requirements) == len(bundle.PACKAGES) and requirements[0].startswith("deepspeed==")
