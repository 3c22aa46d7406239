"""Tests the installed files, the contents of a release, and its metadata."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import beit3_ds.kernels
from beit3_ds.config.renamed_keys import RENAMED_KEYS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KERNEL_FILES = ("ops/__init__.py", "triton/__init__.py", "triton/budgets.json", "cpu/__init__.py")
IMPORT = """
import json
from importlib.resources import files
import beit3_ds, beit3_ds.kernels, beit3_ds.kernels.ops
budgets = json.loads(files("beit3_ds.kernels.triton").joinpath("budgets.json").read_text())
print(beit3_ds.kernels.__file__, len(budgets))
"""


def test_constraints_fix_all_that_is_required() -> None:
    """Catches a new dependency without a pinned version, and a version that pyproject.toml does not allow."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    fixed = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(fixed) == len(lines)
    required = map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]])
    for requirement in required:
        assert requirement.specifier.contains(fixed[canonicalize_name(requirement.name)]), requirement


def test_the_changelog_tells_this_version_and_all_renamed_keys() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\S+)", text, re.MULTILINE)
    assert newest is not None and newest[1] == PROJECT["version"]
    for old, new in RENAMED_KEYS.items():
        assert re.search(rf"^\| `[\w.*]*{old}` \| `[\w.*]*{new}` \|", text, re.MULTILINE), f"{old} -> {new}"


def build(command: list[str], folder: Path) -> Path:
    """Builds from a copy of the sources, so the repository stays clean; returns the only file built."""
    source, built = folder / "source", folder / "built"
    left_out = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    built.mkdir()
    done = subprocess.run([sys.executable, *command, built], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = built.iterdir()
    return file


def check_imports(site: Path, empty: Path) -> None:
    """Checks that the package in `site` works in an empty folder without the repository."""
    empty.mkdir()
    program = f"import sys; sys.path.insert(0, {str(site)!r})\n{IMPORT}"
    done = subprocess.run([sys.executable, "-c", program], cwd=empty, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    budgets = json.loads((ROOT / "kernels/triton/budgets.json").read_text())
    assert done.stdout.splitlines()[-1] == f"{site}/beit3_ds/kernels/__init__.py {len(budgets)}"


def test_a_wheel_contains_the_kernels(tmp_path: Path) -> None:
    """Catches a wheel without the kernels; `beit3_ds/kernels` is a symbolic link in the repository."""
    wheel = build(["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", ".", "-w"], tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {f"beit3_ds/kernels/{name}" for name in KERNEL_FILES} <= names
    assert any(re.fullmatch(r"beit3_ds/sample_data/.*\.tar", name) for name in names)
    assert not any(name.startswith(("tests/", "kernels/")) for name in names)
    check_imports(tmp_path / "site", tmp_path / "empty")


def test_a_source_archive_contains_the_kernels(tmp_path: Path) -> None:
    """Catches an archive without the Python kernels, or without the CUDA C++ sources that `setup.py` compiles."""
    archive = build(
        ["-c", "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"], tmp_path
    )
    with tarfile.open(archive) as members:
        members.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    for name in KERNEL_FILES:
        assert (source / "beit3_ds/kernels" / name).is_file()
    for path in (ROOT / "kernels/csrc").iterdir():
        assert (source / "kernels/csrc" / path.name).is_file(), f"{path.name} is not in the archive: see MANIFEST.in"
    check_imports(source, tmp_path / "empty")


def test_the_installed_kernels_are_those_of_the_folder() -> None:
    """Checks that the installed kernels are the files of the folder `kernels`, so that tools and imports agree."""
    (folder,) = map(Path, beit3_ds.kernels.__path__)
    assert folder.resolve() == ROOT / "kernels" or "site-packages" in folder.parts
    assert (ROOT / "beit3_ds/kernels").is_symlink() and (ROOT / "beit3_ds/kernels").resolve() == ROOT / "kernels"


def test_the_hosted_workflow_runs_what_a_developer_runs() -> None:
    """Catches a separate list of checks in the hosted workflow, which would drift from the developer's."""
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    (command,) = re.findall(r"^ +- run: (.+)$", workflow, re.MULTILINE)
    assert command.endswith(" .ci/run")
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "make test"
