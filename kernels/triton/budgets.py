"""Reads and writes `budgets.json`, which stores properties of each kernel's machine code by Triton version.

Triton versions allocate registers differently, so a kernel may spill registers with one version and not with another.
Tile sizes that spill with the installed version are not used (`spilling_variants`).
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

BUDGETS = Path(__file__).with_name("budgets.json")


class Report(NamedTuple):
    """Holds properties of the machine code of one kernel variant."""

    registers: int
    """Registers per thread; at most 255."""
    stack: int
    """Bytes of stack per thread. Only spilled registers use the stack."""
    spills: int
    """Number of instructions that load or store spilled registers."""
    shared_memory: int
    """Bytes of shared memory per Triton program (thread block)."""
    tensor_core: int
    """Number of tensor-core instructions: HMMA, HGMMA or UTCxMMA."""
    async_copies: int
    """Number of asynchronous copies from global to shared memory."""
    wide_accesses: int
    """Number of instructions that load, store or copy 128 bits of global memory per thread."""
    narrow_accesses: int
    """Number of instructions that access fewer than 128 bits of global memory per thread. They access row statistics,
    or data whose accesses the compiler could not vectorise."""


Budgets = Mapping[tuple[str, int], Report]
"""Stored properties of the machine code, by variant name and GPU architecture. New machine code must not be worse."""


def version_key(version: str) -> str:
    """Returns the key in `budgets.json` for a Triton version: "3.8" for "3.8.1"."""
    return ".".join(version.split("+")[0].split(".")[:2])


def stored_versions() -> list[str]:
    """Returns the Triton versions that have an entry in `budgets.json`, oldest first, for example ["3.6", "3.8"]."""
    return sorted(_stored(), key=_number)


def read_budgets(version: str) -> dict[tuple[str, int], Report]:
    """Returns the machine-code properties stored for a Triton version, by variant name and GPU architecture.

    Returns an empty dict if `budgets.json` has no entry for the version.
    """
    return {
        (name, int(architecture.removeprefix("sm_"))): Report(*values)
        for name, by_architecture in _stored().get(version_key(version), {}).items()
        for architecture, values in by_architecture.items()
    }


def write_budgets(version: str, reports: Budgets) -> None:
    """Replaces the entry of one Triton version in `budgets.json`, and keeps the entries of all other versions.

    Args:
        version: Triton version that compiled the kernels.
        reports: new properties of the machine code, by variant name and GPU architecture.
    """
    nested: dict[str, dict[str, Report]] = {}
    for (name, architecture), report in sorted(reports.items()):
        nested.setdefault(name, {})[f"sm_{architecture}"] = report
    stored = _stored() | {version_key(version): nested}
    blocks = []
    for key in sorted(stored, key=_number):
        lines = [f"    {json.dumps(name)}: {json.dumps(values)}" for name, values in stored[key].items()]
        blocks.append(f"  {json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n  }")
    head = f'{{\n  "columns": {json.dumps(Report._fields)},\n'
    BUDGETS.write_text(head + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


@lru_cache
def spilling_variants(version: str, architecture: int) -> frozenset[str]:
    """Returns the names of the kernel variants that spill registers, for a Triton version and a GPU architecture.

    If `budgets.json` has no entry for the version, the entry of the newest older version is used. The set is empty if
    there is no older entry, or if the entry lacks the architecture.
    """
    older = [known for known in stored_versions() if _number(known) <= _number(version_key(version))]
    budgets = read_budgets(older[-1]) if older else {}
    return frozenset(name for (name, sm), report in budgets.items() if sm == architecture and report.spills)


def _stored() -> dict[str, dict[str, dict[str, list[int]]]]:
    if not BUDGETS.exists():
        return {}
    content = json.loads(BUDGETS.read_text(encoding="utf-8"))
    assert content.pop("columns") == list(Report._fields), f"{BUDGETS} has other columns: write it again"
    return dict(content)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
