"""Formats the result of a cluster check: a table of all hosts and one line per fault."""

import hashlib
from collections.abc import Callable, Sequence

from beit3_ds.cluster.check.fault import CHECKS, Fault, show_bytes
from beit3_ds.cluster.check.inspection import Answers, Inspection
from beit3_ds.cluster.hostfile import Hostfile

_WRONG, _NOTED = "!", "~"  # marks before a value


def describe_nodes(inspection: Inspection, faults: Sequence[Fault]) -> str:
    """Formats a table with one row per host and one column per check. `!` marks a fault, and `~` marks a note."""
    marks = {(fault.host, fault.check): _NOTED for fault in faults if fault.is_note}
    marks |= {(fault.host, fault.check): _WRONG for fault in faults if not fault.is_note}
    rows = [["host", "slots", *CHECKS]]
    for node in inspection.answers:
        cells = [(check, _CELLS[check](node)) for check in CHECKS]
        marked = [marks.get((node.name, check), marks.get(("", check), "")) + cell for check, cell in cells]
        rows.append([node.name, str(node.slots), *marked])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def describe_faults(hostfile: Hostfile, faults: Sequence[Fault]) -> str:
    """Formats one line per note, then one line with the numbers of hosts, ranks and faults, then one line per fault.

    An element of `faults` with `is_note` is a note, and does not count as a fault.
    """
    ranks = f"{_count(len(hostfile.hosts), 'host')}, {_count(hostfile.world_size, 'rank')}"
    notes = [f"note: {fault}" for fault in faults if fault.is_note]
    lines = [f"* {fault}" for fault in faults if not fault.is_note]
    if not lines:
        return "\n".join([*notes, f"{ranks}: no fault found"])
    return "\n".join([*notes, f"{ranks}, {_count(len(lines), 'fault')}:", *lines])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _answer(node: Answers) -> str:
    return f"{node.seconds:.1f} s" if node.machine else "none"


def _python(node: Answers) -> str:
    return node.machine["python"] if node.machine else "-"


def _version(package: str) -> Callable[[Answers], str]:
    return lambda node: node.software["versions"][package] or "none" if node.software else "-"


def _code(node: Answers) -> str:
    """Returns a short digest of all source files. Nodes with the same code have the same digest."""
    if node.software is None:
        return "-"
    files = node.software["code"]
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:7] if files else "none"


def _gpus(node: Answers) -> str:
    if node.gpus is None:
        return "-"
    gpus = node.gpus["gpus"]
    if not gpus:
        return "error" if node.gpus["error"] else "none"
    smallest = min((gpu["total"] or 0 for gpu in gpus), default=0)
    return f"{len(gpus)}x{smallest / 2**30:.0f}GiB"


def _disk(node: Answers) -> str:
    """Returns the free space on the node's fullest checked disk, as text."""
    free = [disk["free"] for disk in node.disks.values() if "free" in disk]
    return show_bytes(min(free)) if free else "-"


def _limits(node: Answers) -> str:
    return f"{node.machine['open_files']} files" if node.machine else "-"


def _clock(node: Answers) -> str:
    if node.clock is None:
        return "-"
    return f"{node.clock:+.1f} s" if abs(node.clock) >= 0.05 else "0 s"


def _network(node: Answers) -> str:
    return f"{node.interface or '?'} {node.source_address}" if node.source_address else "-"


def _port(node: Answers) -> str:
    """Returns "free" or "taken" for the master port on the first host, and "-" for other hosts."""
    if node.listener is None or not node.listener["wanted"]:
        return "-"
    return "taken" if node.listener["owner"] else "free"


def _shared(node: Answers) -> str:
    if node.token_error is not None:
        return "no"
    if node.tokens_missing is None:
        return "-"
    return "no" if node.tokens_missing else "yes"


def _files(node: Answers) -> str:
    return "-" if node.files is None else f"{sum(number for number, _ in node.files.values())}"


_CELLS: dict[str, Callable[[Answers], str]] = {
    "answer": _answer,
    "python": _python,
    "torch": _version("torch"),
    "deepspeed": _version("deepspeed"),
    "code": _code,
    "GPUs": _gpus,
    "disk": _disk,
    "limits": _limits,
    "clock": _clock,
    "network": _network,
    "port": _port,
    "shared": _shared,
    "files": _files,
}
