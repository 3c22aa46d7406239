"""Compares this project with DeepSpeed and its `zero_to_fp32` at saving, loading and exporting checkpoints."""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from beit3_ds.benchmarks.checkpoint.processes import POLL_SECONDS, run_ranks, start_module
from beit3_ds.benchmarks.checkpoint.ranks import OURS, THEIRS, drop_from_cache
from beit3_ds.benchmarks.checkpoint.size import Choice, choose_size
from beit3_ds.benchmarks.peak_memory import status_bytes
from beit3_ds.config import ConfigError
from beit3_ds.model.pretrained import PretrainedWeights

_SAVES, _LOADS, _EXPORTS = 3, 3, 5  # rounds of each operation
_READ_BYTES = 1 << 24
_EXPORTERS = {OURS: "export", THEIRS: "zero_to_fp32"}
Row = dict[str, Any]


def benchmark_checkpoint(
    size: str | None = None, ranks: int = 2, folder: str | None = None, json_path: str | None = None
) -> str:
    """Measures saving, loading and exporting with this project and with DeepSpeed in turn, and returns a report.

    The ranks hold the state of a bfloat16 run under ZeRO-3: bfloat16 parameters, float32 master weights and float32
    moments. No step is trained. Before each operation, earlier writes are flushed to the disk. Before each save or
    load, freed memory is returned to the system. Loading starts with the files outside the page cache, and exporting
    with the files in the page cache. Peak memory is VmHWM, which includes the memory of torch. For saving and loading,
    VmHWM is summed over the ranks. An export is a single process. In the summary, "states" means the size of the state,
    summed over the ranks.

    Args:
        size: model size. None means the largest size in `SIZES` that fits into memory and on the disk (`choose_size`).
        ranks: number of processes that hold the state.
        folder: folder for temporary files; None means the working directory.
        json_path: file for the results (`rows` and `summary`) as JSON.

    Raises:
        ConfigError: if the given size is unknown or does not fit; if no size fits; or if the folder of `json_path` does
            not exist.
    """
    if json_path and not Path(json_path).absolute().parent.is_dir():
        raise ConfigError(f"{json_path}: cannot be written: there is no such folder.")
    root = Path(folder or ".")
    root.mkdir(parents=True, exist_ok=True)
    choice = choose_size(size, ranks, root)
    _say(f"{choice.size}, {choice.num_parameters / 1e6:.0f}M parameters: {choice.reason}")
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=root, prefix=".bench-checkpoint-") as scratch:
        rows = _measure_ranks(Path(scratch), choice.size, ranks) + _measure_exports(Path(scratch))
    summary = {**_summarize(rows), "size": choice.size, "ranks": ranks, "load_average": load_average}
    if json_path:
        Path(json_path).write_text(json.dumps({"rows": rows, "summary": summary}, indent=2))
    return _describe(choice, rows, summary)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _measure_ranks(folder: Path, size: str, ranks: int) -> list[Row]:
    """Measures saving checkpoints and loading them in new processes, and checks that the loaded state equals the saved
    state.
    """
    saved = run_ranks(folder, "save", size, _SAVES, ranks)
    _say("saved")
    loaded = run_ranks(folder, "load", size, _LOADS, ranks)
    _say("loaded")
    for before, after in zip(saved, loaded, strict=True):
        assert before["fingerprint"] != after["fingerprint"], "the ranks that load began with what was saved"
        for row in after["rows"]:
            assert row.pop("fingerprint") == before["fingerprint"], f"{row['by']} loaded something else"
    rows = [_join(rows) for result in (saved, loaded) for rows in zip(*(rank["rows"] for rank in result), strict=True)]
    sums = {key: sum(rank[key] for rank in loaded) for key in ("state_bytes", "library_bytes")}
    return [row | sums if row["operation"] == "load" else row for row in rows]


def _join(rows: Sequence[Row]) -> Row:
    """Merges the results of all ranks into one row: the times of the slowest rank, and the sum of the peak memory."""
    joined = {key: max(row[key] for row in rows) if key.endswith("seconds") else rows[0][key] for key in rows[0]}
    return joined | {"peak_bytes": sum(row["peak_bytes"] for row in rows)}


def _measure_exports(folder: Path) -> list[Row]:
    """Exports this project's and DeepSpeed's checkpoint in turn, and checks that the exported tensors are identical."""
    ours, theirs = folder / f"{OURS}.safetensors", folder / "fp32"
    (checkpoint,) = (folder / OURS).glob("step-*")
    programs: dict[str, tuple[Path, Path, Sequence[str]]] = {
        OURS: (checkpoint, ours, ("beit3_ds.cli.main", "export", str(checkpoint), str(ours))),
        THEIRS: (
            folder / THEIRS,
            theirs,
            ("deepspeed.utils.zero_to_fp32", str(folder / THEIRS), str(theirs), "--safe_serialization"),
        ),
    }
    rows = []
    for number in range(_EXPORTS):
        # The order alternates, so that neither program gains if the machine slows down.
        for by in (OURS, THEIRS) if number % 2 == 0 else (THEIRS, OURS):
            source, out, arguments = programs[by]
            _remove(out)
            drop_from_cache(folder)  # cached files of the other program would take memory
            _read_all(source)
            rows.append({"operation": "export", "by": by} | _run_program(folder / by, out, *arguments))
        _say(f"exported, round {number + 1} of {_EXPORTS}")
    _check_equal(ours, theirs)
    return rows


def _run_program(folder: Path, out: Path, module: str, *arguments: str) -> Row:
    """Runs a module in a new process, and returns times and peak memory.

    The time `synced_seconds` ends when the files in `out` are on the disk.
    """
    os.sync()
    log, peak = folder.with_suffix(".log"), folder.with_suffix(".peak")
    start, anonymous = time.perf_counter(), 0
    process = start_module(log, os.environ, "beit3_ds.benchmarks.peak_memory", str(peak), module, *arguments)
    ended, status = 0, 0
    while not ended:
        anonymous = max(anonymous, status_bytes(process.pid, "RssAnon"))
        time.sleep(POLL_SECONDS)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(
            f"{module} ended with status {process.returncode}:\n{log.read_text(errors='replace')[-2000:]}"
        )
    for path in _files(out):
        with path.open("rb") as file:
            os.fsync(file)
    return {
        "seconds": seconds,
        "synced_seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": int(peak.read_text()),
        "anonymous_bytes": anonymous,
    }


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _read_all(folder: Path) -> None:
    """Reads all files below a folder, so that the files are in the page cache."""
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(_READ_BYTES):
                pass


def _check_equal(ours: Path, theirs: Path) -> None:
    left, names = PretrainedWeights(ours), []
    for file in theirs.glob("*.safetensors"):
        with safe_open(file, "pt") as right:
            for name in right.keys():  # noqa: SIM118 - no mapping
                assert torch.equal(left.read(name), right.get_tensor(name)), f"the exports differ in {name}"
                names.append(name)
    assert sorted(names) == sorted(left.names()), "the exports hold different tensors"


def _summarize(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the figures of the summary by name; most are ratios of medians.

    A memory ratio is DeepSpeed's memory divided by this project's. A time ratio is this project's time divided by
    DeepSpeed's.
    """
    saves = [row for row in rows if row["operation"] == "save" and row["by"] == OURS]
    blocking = statistics.median(row["seconds"] for row in saves)
    later = [row["held_up_seconds"] for row in saves if not row["is_first"]] or [saves[0]["held_up_seconds"]]
    held_up = statistics.median(later)
    states, libraries = (_median(rows, "load", OURS, key) for key in ("state_bytes", "library_bytes"))

    def time_ratio(operation: str, key: str) -> float:
        return _median(rows, operation, OURS, key) / _median(rows, operation, THEIRS, key)

    def memory_ratio(operation: str, key: str) -> float:
        return _median(rows, operation, THEIRS, key) / _median(rows, operation, OURS, key)

    return {
        "export_memory_ratio": memory_ratio("export", "peak_bytes"),
        "export_time_ratio": time_ratio("export", "seconds"),
        "stall_share": held_up / blocking,
        "worst_stall_share": max(later) / blocking,
        "first_stall_share": saves[0]["held_up_seconds"] / blocking,
        "stall_share_of_deepspeed": held_up / _median(rows, "save", THEIRS, "seconds"),
        "export_anonymous_memory_ratio": memory_ratio("export", "anonymous_bytes"),
        "export_synced_time_ratio": time_ratio("export", "synced_seconds"),
        "export_cpu_time_ratio": time_ratio("export", "cpu_seconds"),
        "save_time_ratio": time_ratio("save", "synced_seconds"),
        "load_time_ratio": time_ratio("load", "seconds"),
        "load_memory_ratio": memory_ratio("load", "peak_bytes"),
        "load_peak_share": _median(rows, "load", OURS, "peak_bytes") / states,
        "load_peak_share_without_libraries": (_median(rows, "load", OURS, "peak_bytes") - libraries) / states,
        "states_gb": states / 1e9,
    }


def _median(rows: Sequence[Row], operation: str, by: str, key: str) -> float:
    return statistics.median(row[key] for row in rows if (row["operation"], row["by"]) == (operation, by))


def _describe(choice: Choice, rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    lines = [
        f"{choice.size}, {choice.num_parameters / 1e6:.0f}M parameters, {summary['ranks']} ranks; {choice.reason}",
        f"load average at the start {summary['load_average']:.1f}; medians (lowest to highest)",
        "",
        "| operation | by | seconds | until on the disk | peak memory (GB) |",
        "|---|---|---|---|---|",
    ]
    for operation in ("save", "load", "export"):
        for by in (OURS, THEIRS):
            some = [row for row in rows if (row["operation"], row["by"]) == (operation, by)]
            cells = [_spread([row[key] for row in some if key in row]) for key in ("seconds", "synced_seconds")]
            name = _EXPORTERS[by] if operation == "export" else by
            lines.append(f"| {operation} | {name} | {' | '.join(cells)} | {_peak(some) / 1e9:.2f} |")
    figure = {name: f"{value:.2f}" for name, value in summary.items() if isinstance(value, float)}
    lines += [
        "",
        f"export: zero_to_fp32 takes {figure['export_memory_ratio']} times the memory (pages of mapped files left out "
        f"{figure['export_anonymous_memory_ratio']}), and export {figure['export_time_ratio']} of its time (until on "
        f"the disk {figure['export_synced_time_ratio']}, CPU time {figure['export_cpu_time_ratio']})",
        f"save: training is held up for {figure['stall_share']} of a blocking save (at worst "
        f"{figure['worst_stall_share']}, the first time {figure['first_stall_share']}), or "
        f"{figure['stall_share_of_deepspeed']} of DeepSpeed's",
        f"load: peaks at {figure['load_peak_share']} times the states of {figure['states_gb']} GB (libraries left out "
        f"{figure['load_peak_share_without_libraries']})",
    ]
    return "\n".join(lines)


def _peak(rows: Sequence[Row]) -> float:
    """Returns the peak memory of an operation in bytes: the median over the rounds, except for DeepSpeed's saves.

    For DeepSpeed's saves, returns the peak of the first round, in which DeepSpeed saves before this project does. In
    later rounds, the process holds this project's copy of the state, and this copy would count as DeepSpeed's memory.
    """
    if (rows[0]["operation"], rows[0]["by"]) == ("save", THEIRS):
        return float(rows[0]["peak_bytes"])
    return statistics.median(row["peak_bytes"] for row in rows)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"
