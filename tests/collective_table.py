"""Reads the table of all collectives in docs/traffic_and_memory.md."""

import re
from typing import NamedTuple

from tests.collective_calls import ROOT, Call

HOST, DEVICES = ("host",), ("device",)
"""Kinds of sent values: values in host memory, sent over gloo, and tensors on a device."""
BY_READING = "reading"
_KINDS = {"host": HOST, "device": DEVICES, "either": ("host", "device"), "none": ()}
_DOCUMENT = ROOT / "docs" / "traffic_and_memory.md"
_HEADER = "| file | function | calls | values | dtype | group | when | shown by |"


class Row(NamedTuple):
    """Describes what a call sends, as one row of the table."""

    kinds: tuple[str, ...]
    """Kinds of values that the call sends."""
    dtypes: set[str]
    """Dtypes of the sent tensors, and "JSON"; empty for a call that only creates groups."""
    group: str
    """Ranks that take part."""
    moment: str
    """When the call is made."""
    run: str
    """Run of `tests/test_collectives.py` that makes the call, or `BY_READING`."""


def read_table() -> dict[Call, Row]:
    """Returns all rows of the table, by the calls that they describe."""
    result: dict[Call, Row] = {}
    inside = False
    for line in _DOCUMENT.read_text().splitlines():
        if line == _HEADER:
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|---"):
            file, function, calls, kind, dtypes, group, moment, run = (
                cell.strip() for cell in line.strip("|").split("|")
            )
            path = file if file.startswith("kernels/") else f"beit3_ds/{file}"
            row = Row(_KINDS[kind], set(dtypes.split(", ")) - {"-"}, group, moment, run)
            for expression in re.findall("`([^`]+)`", calls):
                call = Call(path, function.strip("`"), expression)
                assert call not in result, f"{call} is listed twice"
                result[call] = row
    return result
