"""Tests which package may import which, and the sizes of files and functions."""

import ast
import graphlib
import warnings
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A new arrow is a reviewed change. Only the entry points may import everything.
ARROWS: dict[str, set[str]] = {
    "device_copy": set(),
    "pixels": set(),
    "kernels": {"device_copy"},
    "printing": set(),
    "config": {"printing"},
    "patch_grids": {"device_copy"},
    "layout": {"patch_grids"},
    "batch": {"device_copy", "layout", "patch_grids"},
    "positions": set(),
    "atomic_file": set(),
    "cores": set(),
    "rank_names": set(),
    "storage_error": set(),
    "sample_data": set(),
    "regular_file": set(),
    "untrusted_json": set(),
    "safetensors_header": {"regular_file", "untrusted_json"},
    "lock_holder": {"printing", "untrusted_json"},
    "writer_lock": {"config", "lock_holder", "storage_error"},
    "untrusted_file": {"config", "regular_file", "safetensors_header"},
    "parallel": {"config", "kernels", "rank_names", "storage_error"},
    "tokenizers": {
        *("atomic_file", "config", "parallel", "positions", "printing", "regular_file", "safetensors_header"),
        *("untrusted_file", "untrusted_json"),
    },
    "data": {
        *("atomic_file", "batch", "config", "cores", "patch_grids", "pixels", "printing", "regular_file"),
        *("storage_error", "tokenizers", "untrusted_json"),
    },
    "preprocess": {"data", "regular_file"},
    "model": {
        *("batch", "config", "device_copy", "kernels", "layout", "parallel", "patch_grids", "pixels", "positions"),
        *("regular_file", "safetensors_header", "untrusted_json"),
    },
    "picture": {"atomic_file"},
    "retrying": {"atomic_file", "regular_file"},
    "tasks": {
        *("atomic_file", "batch", "config", "data", "device_copy", "layout", "model", "parallel", "patch_grids"),
        *("picture", "pixels", "printing", "retrying", "storage_error", "tokenizers"),
    },
    "pipeline": {"batch", "config", "model", "parallel", "patch_grids"},
    "checkpoint": {
        *("batch", "config", "cores", "model", "parallel", "printing", "regular_file", "safetensors_header"),
        *("storage_error", "untrusted_json"),
    },
    "weights": {
        *(
            "atomic_file",
            "checkpoint",
            "config",
            "model",
            "positions",
            "printing",
            "safetensors_header",
            "tasks",
            "untrusted_file",
        ),
        *("untrusted_json", "writer_lock"),
    },
    # Users' classes around trained weights: files in, answers out. Only commands stand above.
    "inference": {
        *("atomic_file", "batch", "config", "data", "layout", "model", "parallel", "preprocess", "tasks"),
        *("tokenizers", "weights"),
    },
    "planner": {"batch", "config", "kernels", "layout", "model", "parallel", "pipeline", "tasks"},
    "runtime": {"config", "cores", "parallel", "planner", "rank_names", "storage_error", "writer_lock"},
    "training": {
        *("atomic_file", "batch", "checkpoint", "config", "cores", "data", "kernels", "model", "parallel", "pipeline"),
        *("device_copy", "picture", "planner", "printing", "retrying", "runtime", "storage_error", "tasks"),
        *("tokenizers", "untrusted_json"),
    },
    "benchmarks": {
        *("batch", "checkpoint", "config", "cores", "data", "kernels", "model", "parallel", "patch_grids", "pipeline"),
        *("pixels", "runtime", "tasks", "tokenizers", "training", "weights"),
    },
    "cluster": {"config", "planner", "printing", "rank_names", "retrying", "runtime", "writer_lock"},
}
ENTRY_POINTS = {"train", "evaluate", "rank_program", "cli", "__init__"}
# The parts of a room in the order in which they are read: each may import only those before it.
READING_ORDER: dict[str, tuple[str, ...]] = {
    "data": (
        *("randomness", "files", "images", "text", "sources", "validation_overlap", "order", "workers", "drop_path"),
        *(
            "packing",
            "samples",
            "skipped_report",
            "steps",
            "loader",
            "validation",
            "evaluation",
            "tokenizer_corpora",
            "prepare",
        ),
    ),
    "cluster": ("hostfile", "check", "launch"),
}
MAY_IMPORT_DEEPSPEED = {"training", "pipeline", "checkpoint", "runtime"}

FILE_LINES, FUNCTION_LINES = 400, 60


def modules() -> dict[Path, str]:
    """Returns all source files with the packages they belong to."""
    files = dict.fromkeys((ROOT / "kernels").rglob("*.py"), "kernels")  # beit3_ds/kernels is a link to this folder
    for path in set((ROOT / "beit3_ds").rglob("*.py")) - set((ROOT / "beit3_ds" / "kernels").rglob("*.py")):
        parts = path.relative_to(ROOT / "beit3_ds").parts
        files[path] = parts[0].removesuffix(".py")
    return files


@cache
def imports(path: Path) -> frozenset[str]:
    """Returns the full names of modules that a file imports, also inside functions; parses each file once."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def test_import_arrows() -> None:
    wrong = []
    for path, room in modules().items():
        if room in ENTRY_POINTS:
            continue
        for name in imports(path):
            if name.startswith("beit3_ds."):
                target = name.split(".")[1]
                if target != room and target not in ARROWS[room]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}; {room} may import {sorted(ARROWS[room])}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", READING_ORDER)
def test_parts_of_a_room_are_read_in_order(room: str) -> None:
    folder, order = ROOT / "beit3_ds" / room, READING_ORDER[room]
    parts = {path.relative_to(folder).parts[0].removesuffix(".py") for path in folder.rglob("*.py")}
    assert parts - {"__init__"} == set(order), f"list the parts of {room} in READING_ORDER"
    wrong = []
    for number, part in enumerate(order):
        for path in (folder / part).rglob("*.py") if (folder / part).is_dir() else (folder / f"{part}.py",):
            for name in imports(path):
                target = name.removeprefix(f"beit3_ds.{room}.").split(".")[0]
                if name.startswith(f"beit3_ds.{room}.") and target in order[number + 1 :]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}, which is read after {part}")
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_imports() -> None:
    by_name = {}
    for path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        by_name[f"beit3_ds.{name.removeprefix('beit3_ds.')}"] = path
    graph = {}
    for name, path in by_name.items():
        targets = {found for target in imports(path) for found in (target, target.rpartition(".")[0])}
        graph[name] = targets & by_name.keys() - {name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError("modules import each other: " + " -> ".join(error.args[1])) from None


def test_every_room_is_listed() -> None:
    assert set(modules().values()) == set(ARROWS) | ENTRY_POINTS


def test_deepspeed_stays_in_its_rooms() -> None:
    for path, room in modules().items():
        if any(name.split(".")[0] == "deepspeed" for name in imports(path)):
            assert room in MAY_IMPORT_DEEPSPEED, f"{path.relative_to(ROOT)} imports deepspeed"


def test_sizes_are_reported() -> None:
    """Reports large files and functions as warnings; these limits are aims, not strict rules."""
    for path in modules():
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > FILE_LINES:
            warnings.warn(f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines, aim {FILE_LINES}", stacklevel=1)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > FUNCTION_LINES:
                    message = f"{path.relative_to(ROOT)}: {node.name} has {length} lines, aim {FUNCTION_LINES}"
                    warnings.warn(message, stacklevel=1)
