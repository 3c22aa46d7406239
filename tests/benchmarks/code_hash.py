"""Hashes code without its docstrings and comments."""

import ast
import hashlib
from pathlib import Path
from types import ModuleType


def code_hash(module: ModuleType) -> str:
    """Returns the SHA-256 of a module's code; docstrings, comments and layout do not change it."""
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            strings = [s for s in node.body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]
            node.body = [statement for statement in node.body if statement not in strings]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()
