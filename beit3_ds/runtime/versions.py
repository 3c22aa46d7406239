"""Reads the versions of this machine's software, and computes digests of the project's source files.

This file needs only Python 3.8 and the standard library. The cluster check runs the text of this file on nodes that may
have an older Python and no other packages.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import sys

PACKAGES = ("torch", "deepspeed", "beit3_ds")
"""Packages whose versions must be equal on all ranks."""
_CODE_SUFFIXES = (".py", ".json", ".cu", ".cuh", ".cpp", ".h")


def find_package_versions() -> dict[str, str | None]:
    """Returns the version of each package in `PACKAGES`, or None if a package is not installed. Imports no package."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def compute_code_digests() -> dict[str, str] | None:
    """Returns a short digest of each source file of the project, by relative path.

    Returns None if no source file is found, for example because the project is not installed.
    """
    digests: dict[str, str] = {}
    for name in ("beit3_ds", "beit3_ds.kernels"):
        try:
            spec = importlib.util.find_spec(name)
        except Exception:  # a broken parent package: what is missing will differ from the other nodes
            continue
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for where, _, files in os.walk(folder):
                for file in files:
                    if file.endswith(_CODE_SUFFIXES):
                        path = os.path.join(where, file)
                        key = os.path.join(name.replace(".", "/"), os.path.relpath(path, folder))
                        with open(path, "rb") as content:
                            digests[key] = hashlib.sha256(content.read()).hexdigest()[:12]
    return digests or None


def describe_versions() -> dict[str, str]:
    """Returns the versions of Python (major.minor) and of `PACKAGES` by name.

    The key "code" has one digest of the project's code. No package is imported, but all source files of the project are
    read.
    """
    versions = {name: str(version) for name, version in find_package_versions().items()}
    code = hashlib.sha256(repr(sorted((compute_code_digests() or {}).items())).encode()).hexdigest()[:12]
    return {"python": f"{sys.version_info.major}.{sys.version_info.minor}", **versions, "code": code}
