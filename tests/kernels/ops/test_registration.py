"""Tests that every module imports the modules that register the operators it calls."""

import ast
import re
from functools import cache

import pytest

from tests.test_architecture import ROOT

FOLDER = ROOT / "kernels" / "ops"
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
DEFINITION = re.compile(r'_LIBRARY\.define\(\s*"(\w+)\(')


@cache
def source(module: str) -> str:
    return (FOLDER / f"{module}.py").read_text()


def registered(module: str) -> set[str]:
    return set(DEFINITION.findall(source(module)))


def imported(module: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """Returns the modules of `kernels/ops` that importing `module` imports, including itself."""
    found = {module}
    for node in ast.walk(ast.parse(source(module))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            stem = name.removeprefix("beit3_ds.kernels.ops.")
            if stem in MODULES and stem not in seen | found:
                found |= imported(stem, seen | found)
    return found


def called(module: str) -> set[str]:
    """Returns the names of this project's operators that a module mentions.

    It finds names after `torch.ops.beit3_ds.` or `ops.`.
    """
    everything = set().union(*map(registered, MODULES))
    names = {node.attr for node in ast.walk(ast.parse(source(module))) if isinstance(node, ast.Attribute)}
    return {name for name in names if re.search(rf"\bops\.(?:beit3_ds\.)?{name}\b", source(module))} & everything


@pytest.mark.parametrize("module", MODULES)
def test_operators_are_registered_where_they_are_called(module: str) -> None:
    known = set().union(*(registered(name) for name in imported(module)))
    assert called(module) <= known, f"kernels/ops/{module}.py imports nothing that registers {called(module) - known}"


def test_operators_are_found() -> None:
    assert {"activation_norm", "sub_norm", "multiway_weight_gradient"} <= called("out_projection")
    assert "sub_norm_sums" in registered("sub_norm")
