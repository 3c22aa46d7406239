"""Finds all calls in the source that send data to other ranks."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

ROOT = Path(__file__).parents[1]
_SILENT = re.compile(r"get_|is_|supports_|destroy_|set_timeout|record_comm")
_ALSO = {
    "sum_over_data",
    "sum_over_model",
    "sum_over_all",
    "gather_rows_over_data",
    "GatheredParameters",
    "DistributedDataParallel",
}
_ALSO |= {"init_distributed", "allreduce", "allgather", "reduce_scatter_fn", "all_gather_coalesced"}
_SHARED_WORDS = {"broadcast", "collect", "gather", "receive", "recv", "reduce", "scatter", "send", "sum", "barrier"}
"""Method names that tensors, arrays and pipes have too; they count only on objects that send.

Such objects are groups and modules.
"""
_MODULES = ("torch.distributed", "deepspeed.comm", "torch.distributed.distributed_c10d")
_RECEIVERS = re.compile(r"(^|[._])(dist|distributed|comm|host|group|mesh|pipeline|tensor|engine|deepspeed)$")
_OF_ENGINES = {"backward", "step", "initialize"}

SENDING = _ALSO | {
    name
    for name in dist.distributed_c10d.__all__
    if name[0].islower()
    and name != "group"
    and not _SILENT.match(name)
    and callable(getattr(dist.distributed_c10d, name))
}
"""Names of all functions that send data to other ranks, in torch and in this project."""


class Call(NamedTuple):
    """Describes a call at one place in the source."""

    file: str
    function: str
    expression: str


def find_calls() -> list[Call]:
    """Returns all calls that send, in the package and the kernels, in source order."""
    files = [*(ROOT / "beit3_ds").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    return [call for path in sorted(files) for call in find_calls_in(path.read_text(), str(path.relative_to(ROOT)))]


def find_calls_in(source: str, file: str = "") -> Iterator[Call]:
    """Yields the calls that send in one file, and functions that are passed on to be called later."""
    tree = ast.parse(source)
    modules, functions = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name in _MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {alias.asname or alias.name: alias.name for alias in node.names}
            modules |= {own for own, name in names.items() if f"{node.module}.{name}" in _MODULES}
            if node.module.startswith(_MODULES) or node.module.startswith("torch.nn.parallel"):
                functions |= {own for own, name in names.items() if name in SENDING}
    yield from _find(tree, file, "", modules, functions)


def _find(node: ast.AST, file: str, function: str, modules: set[str], functions: set[str]) -> Iterator[Call]:
    for child in ast.iter_child_nodes(node):
        inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
        is_flag = isinstance(node, ast.If) and child is node.test  # DeepSpeed has flags with such names
        if (
            isinstance(child, ast.Attribute)
            and isinstance(child.ctx, ast.Load)
            and not is_flag
            and _sends(child, modules)
        ):
            yield Call(file, function, ast.unparse(child))
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load) and child.id in functions:
            yield Call(file, function, child.id)
        yield from _find(child, file, inner, modules, functions)


def _sends(node: ast.Attribute, modules: set[str]) -> bool:
    receiver = ast.unparse(node.value)
    if node.attr in SENDING - _SHARED_WORDS:
        return True
    of_a_group = receiver in modules or _RECEIVERS.search(receiver) is not None
    return of_a_group and node.attr in _SHARED_WORDS | _OF_ENGINES
