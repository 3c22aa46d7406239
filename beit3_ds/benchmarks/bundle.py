"""Packs a bundle: a folder for tests and measurements of this project on a GPU machine without network access.

    python -m beit3_ds.benchmarks.bundle OUT                         # for this Python, torch and Triton
    python -m beit3_ds.benchmarks.bundle OUT --architecture sm_80
    python -m beit3_ds.benchmarks.bundle OUT --cache DIR             # reuse the kernels of an earlier dry run

The folder contains the committed source tree, wheels of packages that the GPU machine may lack, and a Triton cache with
the compiled kernels of `beit3 certify`. On the GPU machine, run `OUT/certify --minutes 10`. Pack with the same versions
of Python, torch and Triton as on the GPU machine: cache keys depend on Triton's version, and wheels depend on Python's
version.

Compilation takes tens of minutes. With --cache, only kernels that the folder DIR lacks are compiled. This command fills
DIR:

    TRITON_CACHE_DIR=DIR TRITON_STORE_BINARY_ONLY=1 beit3 certify --dry-run sm_90
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from beit3_ds.benchmarks.certify.commands import ROOT
from beit3_ds.benchmarks.moved_cache import relocate
from beit3_ds.config import ConfigError

PACKAGES = (
    *("deepspeed", "hjson", "ninja", "py-cpuinfo", "einops", "msgpack", "pydantic", "pydantic-core"),
    *("annotated-types", "typing-inspection", "zstandard", "webdataset", "braceexpand"),
)
"""Packages that a machine with PyTorch may lack: DeepSpeed, readers of data formats, and those dependencies of
DeepSpeed that PyTorch does not need itself."""

MAX_BYTES = 60 * 2**20
"""Maximum size of a bundle in bytes."""

_ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
_SCRIPT = """#!/usr/bin/env bash
# Runs `beit3 certify` from this folder, without network, with the same arguments. Without --out the report goes to
# certificate/ beside this script. PYTHON names another Python than python3.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$here/tree:$here/packages${PYTHONPATH:+:$PYTHONPATH}" TRITON_CACHE_DIR="$here/triton_cache"
if [ ! -d "$TRITON_CACHE_DIR" ]; then
    "$python" -m tarfile -e "$here/triton_cache.tar.xz" "$here"
    (cd "$here/tree" && "$python" -m beit3_ds.benchmarks.moved_cache "$TRITON_CACHE_DIR")
fi
if [ ! -d "$here/packages" ]; then
    for wheel in "$here"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$here/packages"; done
fi
cd "$here/tree"
exec "$python" -m beit3_ds.cli.main certify --out "$here/certificate" "$@"
"""

Fetch = Callable[[Sequence[str], Path], None]
"""Type of a function that downloads wheels. The arguments are the requirements, and the folder for the wheels."""
FillCache = Callable[[Path, Path, int], None]
"""Type of a function that fills a Triton cache. The arguments are the source tree, the folder of the cache, and the GPU
architecture."""


def pack_bundle(folder: Path, architecture: int, fetch: Fetch, fill_cache: FillCache) -> int:
    """Packs a bundle and returns its size in bytes.

    A bundle is a folder with the committed source tree, wheels, a Triton cache and a script that runs `beit3 certify`
    without network access.

    Args:
        folder: folder to create for the bundle.
        architecture: compute capability of the GPU: 80, 90 or 100.
        fetch: downloads the wheels.
        fill_cache: fills the Triton cache.

    Raises:
        ConfigError: if the folder exists, if this project is not a git clone, or if the bundle is larger than
            `MAX_BYTES`.
    """
    if folder.exists():
        raise ConfigError(f"bundle: {folder} exists. Name a new folder.")
    if not (ROOT / ".git").exists():
        raise ConfigError(
            f"bundle: {ROOT} is not a git clone, so there is no commit to pack. Run this command in a git clone."
        )
    for part in ("tree", "wheels", "triton_cache"):
        (folder / part).mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder / "tree")], input=archive, check=True)
    fetch(pinned(ROOT / "constraints.txt"), folder / "wheels")
    fill_cache(folder / "tree", folder / "triton_cache", architecture)
    with tarfile.open(folder / "triton_cache.tar.xz", "w:xz") as archived:
        archived.add(folder / "triton_cache", "triton_cache")
    shutil.rmtree(folder / "triton_cache")
    script = folder / "certify"
    script.write_text(_SCRIPT, encoding="utf-8")
    script.chmod(0o755)
    sizes = {part.name: _size(part) for part in folder.iterdir()}
    if sum(sizes.values()) > MAX_BYTES:
        shown = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sizes.items())
        raise ConfigError(f"bundle: larger than {MAX_BYTES / 2**20:.0f} MiB: {shown} MiB. Remove packages or files.")
    return sum(sizes.values())


def pinned(constraints: Path) -> list[str]:
    """Returns the pip requirements of `PACKAGES`, such as "deepspeed==0.19.8", with versions from `constraints`."""
    lines = constraints.read_text(encoding="utf-8").splitlines()
    versions = {re.split("==", line)[0].lower().replace("_", "-"): line for line in lines if "==" in line}
    return [versions[name] for name in PACKAGES]


def download(requirements: Sequence[str], folder: Path) -> None:
    """Downloads wheels for this Python with pip, and builds a wheel if pip finds only a source archive.

    Raises:
        ConfigError: if pip fails.
    """
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *requirements]
    if subprocess.run(command, check=False).returncode:
        raise ConfigError(f"bundle: pip could not fetch {', '.join(requirements)}. See pip's message above.")


def fill_triton_cache(tree: Path, cache: Path, architecture: int, filled: Path | None = None) -> None:
    """Fills a Triton cache with compiled kernels. For this, runs `beit3 certify --dry-run` in a source tree.

    Only the files that a GPU needs to run the kernels are stored.

    Args:
        tree: source tree of this project. The folder `wheels` beside the tree contains packages for the dry run.
        cache: folder of the Triton cache.
        architecture: compute capability of the GPU: 80, 90 or 100.
        filled: Triton cache of an earlier dry run. Its kernels are copied first, and only missing kernels are compiled.
            None compiles all kernels.

    Raises:
        ConfigError: if the dry run fails.
    """
    if filled is not None:
        shutil.copytree(filled, cache, dirs_exist_ok=True)
        relocate(cache)
    report, packages = (cache.with_name(name).resolve() for name in ("dry_run", "packages"))
    for wheel in tree.with_name("wheels").glob("*.whl"):  # DeepSpeed's engine is a section
        zipfile.ZipFile(wheel).extractall(packages)
    stored = {
        "TRITON_CACHE_DIR": str(cache.resolve()),
        "TRITON_STORE_BINARY_ONLY": "1",
        "PYTHONPATH": f"{tree.resolve()}:{packages}",
    }
    command = [sys.executable, "-m", "beit3_ds.cli.main", "certify", "--out", str(report), "--dry-run"]
    if subprocess.run([*command, f"sm_{architecture}"], cwd=tree, env=os.environ | stored, check=False).returncode:
        raise ConfigError(
            f"bundle: the dry run of `beit3 certify` failed. See {report / 'certificate.md'} for the reason."
        )
    shutil.rmtree(report)
    shutil.rmtree(packages, ignore_errors=True)
    for compiled in tree.rglob("__pycache__"):
        shutil.rmtree(compiled)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.lstat().st_size for file in files if not file.is_dir() or file.is_symlink())


def main(arguments: Sequence[str] | None = None) -> int:
    """Creates a folder with all files for running `beit3 certify` on a GPU machine that has no network access. Returns
    the exit status: 0 on success, and 2 after a mistake of the user, which is printed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--architecture", choices=_ARCHITECTURES, default="sm_90", help="default: sm_90 (H100, H200)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="Triton cache of an earlier dry run, to copy")
    options = parser.parse_args(arguments)
    try:
        fill = partial(fill_triton_cache, filled=options.cache)
        size = pack_bundle(options.out, _ARCHITECTURES[options.architecture], download, fill)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {size / 2**20:.1f} MiB; there, {options.out.name}/certify --minutes 10")
    return 0


if __name__ == "__main__":
    sys.exit(main())
