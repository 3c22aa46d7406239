"""Writes the report of `beit3 certify` as Markdown and JSON, from the lines of the results file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beit3_ds.benchmarks.certify.plan import MACHINE, Section
from beit3_ds.benchmarks.certify.results import ABSENT, DONE, NEEDS_DEVICE, Line, ResultsFile, describe_cache

RESULTS = "results.jsonl"
"""Name of the results file in the report's folder."""
_HIDDEN = ("section", "item", "call")


def write_report(results: ResultsFile, folder: Path, plan: Sequence[Section]) -> list[str]:
    """Writes `certificate.json` and `certificate.md` into the report's folder.

    Args:
        results: results file.
        folder: folder of the report.
        plan: sections, in the order of the report.

    Returns:
        The names of sections that did not complete, and of sections with a failed measurement or check. Exception: a
        section that could not run, because a package or a GPU is missing, is not in this list.
    """
    lines = list(results.read())
    machines = [_figures(line) for line in lines if line.get("section") == MACHINE.name and "devices" in line]
    sections = [_describe(section, lines) for section in plan]
    failed = [MACHINE.name] if not machines else []
    failed += [section["name"] for section in sections if not section["ok"]]
    content = {
        "ok": not failed,
        "machine": machines[-1] if machines else None,
        "commits": list(dict.fromkeys(f"{machine['commit']}, source {machine['source']}" for machine in machines)),
        "calls": [line for line in lines if "section" not in line],
        "sections": sections,
    }
    (folder / "certificate.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "certificate.md").write_text(_markdown(content, folder), encoding="utf-8")
    return failed


def _describe(section: Section, lines: Sequence[Line]) -> dict[str, Any]:
    """Returns the status, total time and measurements of one section.

    The key `items` maps the name of each measurement to its latest result.
    """
    own = [line for line in lines if line.get("section") == section.name]
    ends = [line for line in own if "seconds" in line and "status" in line]
    items: dict[str, dict[str, Any]] = {}
    for line in own:
        if "item" in line:
            figures = {"error": "it began and did not end"} if line.get("begun") else _figures(line)
            items[line["item"]] = figures
    status = ends[-1]["status"] if ends else "not begun"
    failed = [name for name, item in items.items() if item.get("error") or item.get("passed") is False]
    return {
        "name": section.name,
        "title": section.title,
        "status": status,
        "ok": not failed and (status in (DONE, NEEDS_DEVICE) or status.startswith(ABSENT)),
        "failed": failed,
        "seconds": round(sum(line["seconds"] for line in ends), 1),
        "estimated_seconds": section.seconds,
        "maximum_seconds": section.limit,
        "kernels": describe_cache(own, section.name),
        "tail": ends[-1].get("tail") if ends else None,
        "items": items,
    }


def _figures(line: Line) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in _HIDDEN}


def _markdown(content: dict[str, Any], folder: Path) -> str:
    machine = content["machine"] or {}
    text = ["# Certificate", ""]
    for name, value in machine.items():
        if name not in ("commit", "source"):
            shown = value if isinstance(value, str) else json.dumps(value)
            text.append(f"* {name}: {shown}")
    text += [f"* commit: {commit}" for commit in content["commits"]]
    text += ["", "| section | status | failed | seconds (estimated, maximum) | kernels |", "|---|---|---|---|---|"]
    for section in content["sections"]:
        times = f"{section['seconds']:.0f} ({section['estimated_seconds']}, {section['maximum_seconds']})"
        cells = (section["name"], section["status"], len(section["failed"]), times, section["kernels"])
        text.append(f"| {' | '.join(map(str, cells))} |")
    for section in content["sections"]:
        text += ["", f"## {section['title']}", "", *_tables(section["items"])]
        if section["tail"]:
            text += ["", "```", section["tail"].strip().replace("```", "'''"), "```"]
    for path in sorted((folder / "choices").glob("*.json")):
        text += ["", f"## Chosen implementations (`choices/{path.name}`)", "", *_choices(path)]
    return "\n".join(text) + "\n"


def _tables(items: dict[str, dict[str, Any]]) -> list[str]:
    """Returns Markdown tables of measurements (items).

    Measurements whose values have the same names share one table.
    """
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for name, item in items.items():
        groups.setdefault(tuple(item), []).append([name, *(_show(value) for value in item.values())])
    text = []
    for columns, rows in groups.items():
        text += ["", f"| {' | '.join(('item', *columns))} |", "|---" * (len(columns) + 1) + "|"]
        text += [f"| {' | '.join(row)} |" for row in rows]
    return text[1:]


def _choices(path: Path) -> list[str]:
    cases = json.loads(path.read_text(encoding="utf-8"))
    text = ["| case | chosen | ms |", "|---|---|---|"]
    for case, found in cases.items():
        times = ", ".join(f"{name} {ms:.4g}" for name, ms in found["milliseconds"].items())
        text.append(f"| {case} | {found['fastest']} | {times} |")
    return text


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("\n", " ").replace("|", "\\|")
