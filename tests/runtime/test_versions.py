"""Tests that versions and code of a node are found without imports, also by a Python that lacks the packages."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from beit3_ds.runtime import versions

STANDARD_LIBRARY_ONLY = "-I", "-S"  # isolated: neither site-packages nor this folder


def test_installed_versions_are_found() -> None:
    found = versions.find_package_versions()
    assert found["torch"] == importlib.metadata.version("torch") and set(found) == set(versions.PACKAGES)


def test_digests_name_every_file_and_change_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "beit3_ds"
    (package / "kernels").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "kernels" / "__init__.py").touch()
    (package / "kernels" / "fast.cu").write_text("one")
    (package / "notes.txt").touch()  # no code
    for name in [name for name in sys.modules if name.partition(".")[0] == "beit3_ds"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "editable" not in repr(finder)])
    before = versions.compute_code_digests()
    assert before is not None
    assert set(before) == {"beit3_ds/__init__.py", "beit3_ds/kernels/__init__.py", "beit3_ds/kernels/fast.cu"}
    (package / "kernels" / "fast.cu").write_text("two")
    after = versions.compute_code_digests()
    assert after is not None
    assert {path for path in before if before[path] != after[path]} == {"beit3_ds/kernels/fast.cu"}


def test_a_node_without_the_packages_says_so() -> None:
    """Checks that the program sent to nodes needs only the standard library."""
    source = Path(versions.__file__).read_text()
    ast.parse(source, feature_version=(3, 8))
    program = f"{source}\nprint(find_package_versions(), compute_code_digests(), describe_versions()['python'])"
    done = subprocess.run(
        [sys.executable, *STANDARD_LIBRARY_ONLY, "-c", program], capture_output=True, text=True, check=True, cwd="/"
    )
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert done.stdout.strip() == f"{dict.fromkeys(versions.PACKAGES)} None {python}"
