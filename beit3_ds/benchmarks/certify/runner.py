"""Runs the sections of `beit3 certify` one after another, each in its own process with a time limit."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from beit3_ds.benchmarks.certify.plan import MACHINE, PLAN, Section
from beit3_ds.benchmarks.certify.report import RESULTS, write_report
from beit3_ds.benchmarks.certify.results import ABSENT, DONE, NEEDS_DEVICE, ResultsFile, describe_cache
from beit3_ds.config import ConfigError

_ATTEMPTS = 5
_TAIL_BYTES = 2000
_DRY_RUN_LIMIT = 24 * 3600
_SAME = ("devices", "cuda", "python", "versions")


def certify(
    folder: Path,
    *,
    minutes: float | None = None,
    only: Sequence[str] = (),
    plan: Sequence[Section] = PLAN,
    machine: Section = MACHINE,
    architecture: int | None = None,
) -> int:
    """Runs each section whose results in `folder` are missing, incomplete or failed, and updates the report after each
    section.

    After the machine's section, runs the sections that have no recorded status. Then runs sections that have failed
    measurements, and sections that did not complete, for example because an earlier call was killed. Skips measurements
    that succeeded before.

    Args:
        folder: folder for the report, the results and the sections' logs; created if missing.
        minutes: time limit of this call, after which the running section is killed; None for no limit.
        only: names of the sections to run; empty for all sections.
        plan: sections, the most important first.
        machine: section that describes the machine. It runs first in every call.
        architecture: compute capability of a GPU to emulate (`dry_run`): 80, 90 or 100. None measures this machine.

    Returns:
        Exit status 0 if the machine is described, and all requested sections are complete without a failed measurement
        or check (`write_report`), in this call or in an earlier call. Otherwise 1. A section that lacks a package or a
        GPU counts as complete.

    Raises:
        ConfigError: if a name in `only` is unknown, if the folder contains other files, or if the results are from
            another machine.
    """
    if unknown := [name for name in only if name not in [section.name for section in plan]]:
        names = ", ".join(repr(section.name) for section in plan)
        raise ConfigError(f"certify: no section is called {' or '.join(map(repr, unknown))}; there are {names}.")
    end = None if minutes is None else time.monotonic() + 60 * minutes
    if architecture is not None and minutes is None:  # because compilation takes longer than runs on a GPU
        plan = [replace(section, limit=_DRY_RUN_LIMIT) for section in plan]
    results = _open(folder)
    call = results.call + 1
    results.append({"call": call, "minutes": minutes, "date": time.strftime("%Y-%m-%d %H:%M:%S")})
    _run(machine, results, call, _seconds_left(end, machine.limit), architecture)
    _check_machine(results, folder)
    wanted = [section for section in plan if not only or section.name in only]
    for number, section in enumerate(pending := _pending(wanted, results), start=1):
        seconds = _seconds_left(end, section.limit)
        if seconds <= 0:
            break
        print(f"[{number}/{len(pending)}] {section.name}: {section.title}", flush=True)
        status = _run(section, results, call, seconds, architecture)
        counts = describe_cache(list(results.read()), section.name)
        print(f"      {status}{counts and f'; kernels: {counts}'}", flush=True)
        write_report(results, folder, plan)
    failed = write_report(results, folder, plan)
    if never := [section.name for section in wanted if section.name not in results.statuses()]:
        print(f"not begun within {minutes} minutes: {', '.join(never)}; call `beit3 certify` again to continue")
    print(f"report: {folder / 'certificate.md'} and {folder / 'certificate.json'}")
    return 1 if {machine.name, *(section.name for section in wanted)} & set(failed) else 0


def describe_plan(plan: Sequence[Section] = PLAN) -> str:
    """Returns a text that lists the sections in order, each with its time limit and its estimated seconds on a GPU."""
    lines = [
        f"{section.name:12} about {section.seconds:4} s, at most {section.limit:4} s: {section.title}"
        for section in plan
    ]
    return "\n".join([*lines, f"all: about {sum(section.seconds for section in plan) / 60:.0f} minutes on one GPU"])


def _open(folder: Path) -> ResultsFile:
    results = ResultsFile(folder / RESULTS)
    if folder.exists() and any(folder.iterdir()) and not results.path.exists():
        raise ConfigError(
            f"certify: {folder} contains files that are no results of `beit3 certify`. Name another folder with --out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    return results


def _pending(plan: Sequence[Section], results: ResultsFile) -> list[Section]:
    """Returns the sections to run, in order.

    Sections without a recorded status come first. Incomplete sections and sections with a failed measurement come next.
    """
    statuses, failed = results.statuses(), results.failed_sections()
    new = [section for section in plan if section.name not in statuses]
    return new + [
        section
        for section in plan
        if section.name in statuses and (statuses[section.name] != DONE or section.name in failed)
    ]


def _seconds_left(end: float | None, limit: float) -> float:
    return limit if end is None else min(limit, end - time.monotonic())


def _check_machine(results: ResultsFile, folder: Path) -> None:
    """Raises an error if the results are from another machine, because the figures would not be comparable."""
    found: list[dict[str, Any]] = [line for line in results.read() if line.get("section") == MACHINE.name]
    found = [line for line in found if "devices" in line]
    if len(found) > 1:
        for name in _SAME:
            if found[0].get(name) != found[-1].get(name):
                raise ConfigError(
                    f"certify: {folder} has results with {name} {found[0].get(name)}, but here they are "
                    f"{found[-1].get(name)}. Name another folder with --out."
                )


def _run(section: Section, results: ResultsFile, call: int, seconds: float, architecture: int | None) -> str:
    """Runs a section; records and returns the status.

    If the section's process crashes after it recorded new results, the section runs again.
    """
    start, attempt = time.monotonic(), 0
    while True:
        attempt += 1
        size = results.path.stat().st_size
        status = _run_once(section, results, call, seconds - (time.monotonic() - start), architecture)
        progressed = results.path.stat().st_size > size
        if not status.startswith("crashed") or not progressed or attempt == _ATTEMPTS:
            break
    line: dict[str, Any] = {"section": section.name, "status": status, "call": call}
    line["seconds"] = round(time.monotonic() - start, 1)
    if status.startswith(("crashed", "killed")):
        line["tail"] = _tail(results.path.parent / f"{section.name}.log")
    results.append(line)
    return status


def _run_once(section: Section, results: ResultsFile, call: int, seconds: float, architecture: int | None) -> str:
    """Runs a section's process and returns the status. At the time limit, kills the process and its child processes."""
    command = [sys.executable, "-m", "beit3_ds.benchmarks.certify.section", section.name, section.module]
    command += ["--out", str(results.path), "--call", str(call)]
    command += [] if architecture is None else ["--dry-run", str(architecture)]
    with open(results.path.parent / f"{section.name}.log", "a", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return f"killed after {max(0.0, seconds):.0f} s"
        finally:
            _kill_group(process)
    if status:
        return f"crashed with status {status}"
    return _own_status(section, results, call)


def _own_status(section: Section, results: ResultsFile, call: int) -> str:
    """Returns the status of a section whose process ended without an error.

    If the section lacked a package or a GPU, it has recorded a status in this call of `beit3 certify`; this status is
    returned. Otherwise, the status is "done".

    Args:
        section: the section.
        results: results file.
        call: number of this call of `beit3 certify`.
    """
    for line in reversed(list(results.read())):
        if line.get("section") == section.name and line.get("call") == call and "status" in line:
            status: str = line["status"]
            return status if status == NEEDS_DEVICE or status.startswith(ABSENT) else DONE
    return DONE


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills the process of a section and the child processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path) -> str:
    return log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
