"""Skips proofs of DeepSpeed's faults while everything that they depend on is unchanged.

A proof removes a workaround and shows the resulting error of the pinned DeepSpeed. `pytest --verify-deepspeed` runs all
proofs and records a digest for each proof that passes. The digest covers the versions of DeepSpeed and torch, the code
of the workarounds, and the code of the proofs. A proof with another digest than the recorded one runs with all other
tests, also in continuous integration.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORD = "deepspeed_proofs.json"
MARK = "deepspeed_proof"
PACKAGES = ("deepspeed", "torch")
WORKAROUNDS = (
    "beit3_ds/pipeline/deepspeed_compat.py",
    "beit3_ds/pipeline/zero3_host_time.py",
    "beit3_ds/parallel/mesh.py::ModelParallelUnit",
)
HARNESS = ("tests/training/steps.py", "tests/training/layouts.py")


def digest(sources: Iterable[str], versions: Mapping[str, str]) -> str:
    """Returns a digest of versions and code; comments, docstrings and formatting do not change it."""
    words = [f"{name}=={number}" for name, number in sorted(versions.items())]
    return hashlib.sha256("\n".join([*words, *map(_code, sources)]).encode()).hexdigest()[:16]


def current_digest(test_file: Path) -> str:
    """Returns the digest of the proofs in a file for the current sources and versions."""
    sources = [_source(*name.split("::")) for name in (*WORKAROUNDS, *HARNESS)]
    return digest([*sources, test_file.read_text()], {name: version(name).partition("+")[0] for name in PACKAGES})


def skip_proved(items: Iterable[pytest.Item]) -> None:
    """Skips the proofs that were recorded with the current digest."""
    proofs = [item for item in items if item.get_closest_marker(MARK)]
    digests = {path: current_digest(path) for path in {item.path for item in proofs}}
    for item in proofs:
        if is_proved(item.nodeid, read_record(item.path), digests[item.path]):
            numbers = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
            reason = f"proved for {numbers} and this code; `pytest --verify-deepspeed` proves it again"
            item.add_marker(pytest.mark.skip(reason=reason))


def is_proved(nodeid: str, record: Mapping[str, str], now: str) -> bool:
    """Returns whether a proof was recorded with the current digest."""
    return record.get(nodeid.partition("::")[2]) == now


def read_record(test_file: Path) -> dict[str, str]:
    """Returns the recorded digests of the proofs in a file's folder, by proof name."""
    record = test_file.with_name(RECORD)
    return json.loads(record.read_text()) if record.exists() else {}


class Recorder:
    """Records proofs that pass; a single process records them, also if several processes run tests."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Records one proof, and deletes its records with other digests."""
        if MARK not in report.keywords or report.when != "call":
            return
        name, _, proof = report.nodeid.partition("::")
        record_outcome(ROOT / name, proof, passed=report.passed)


def record_outcome(test_file: Path, proof: str, *, passed: bool) -> None:
    """Records the current digest for a proof that passed, and deletes entries with other digests."""
    now = current_digest(test_file)
    entries = {name: found for name, found in read_record(test_file).items() if found == now and name != proof}
    if passed:
        entries[proof] = now
    test_file.with_name(RECORD).write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")


def _source(name: str, class_name: str | None = None) -> str:
    """Returns the source text of a file, or of one of its classes."""
    text = (ROOT / name).read_text()
    if class_name is None:
        return text
    (node,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return ast.unparse(node)


def _code(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # a string that is a statement does nothing: docstrings, and those under fields
            node.body = [part for part in body if not _is_string(part)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
