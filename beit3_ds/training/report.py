"""Writes the report of a finished run: a plot, the task's HTML pages and a summary."""

import functools
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from beit3_ds.atomic_file import atomic_write
from beit3_ds.data.workers.waiting import StopRequestedError
from beit3_ds.runtime.distributed_stop_signals import DistributedStopSignals
from beit3_ds.runtime.stop_signals import StopSignals
from beit3_ds.training.evaluation import VALIDATION_FOLDER
from beit3_ds.training.plot import plot_losses
from beit3_ds.training.run import Run


def report(run: Run, signals: StopSignals) -> None:
    """Writes the report of a finished run. All ranks must call this function.

    The report uses the moving averages of the weights if the run has them (`training.ema_decay`). A stop signal ends
    the computation between two batches. To write the report after that, start the run's command again.
    """
    try:
        with run.state.averaged_weights():
            write_report(run)
    except StopRequestedError:
        stop = DistributedStopSignals(signals, run.mesh)
        stop.synchronize()
        if run.mesh.is_main:
            _say(f"stopped on {stop.names} before the report was written; the same command writes it")


def write_report(run: Run) -> None:
    """Writes the task's results, losses.png, the task's pages and summary.json, and prints the summary.

    If the plot, a page or the summary cannot be written, prints a warning and raises no error. All ranks must call this
    function, because all ranks together compute the task's results.

    Raises:
        StorageError: if the task's results cannot be written.
        StopRequestedError: on all ranks, if a rank received a stop signal.
    """
    folder = run.results
    results = run.rank_task.write_results(run, folder)
    baselines = run.rank_task.baselines(run)
    pages = run.mesh.pipeline.host.broadcast(run.rank_task.write_pages(run, folder), src=-1)
    if not run.mesh.is_main:
        return
    records = run.metrics_log.figures()
    draw = functools.partial(plot_losses, records, baselines, run.terms)
    plot = folder.write("losses.png", draw)
    summary = _summarize(run, records, baselines) | results | pages | {"checkpoint": str(run.store.newest_path())}
    summary |= {"best": run.best.describe()} if run.best.step is not None else {}
    summary |= {"plot": str(folder.path / "losses.png")} if plot else {}
    summary["metrics"] = str(run.metrics_log.path)
    scored = folder.path / VALIDATION_FOLDER
    summary |= {"results": str(scored)} if scored.is_dir() and any(scored.iterdir()) else {}
    folder.write("summary.json", lambda path: _write_json(summary, path))
    _say(format_summary(summary, {term.name for term in run.terms if term.weight}))


def write_missing(run: Run) -> None:
    """Tries again to write missing files, missing records, and missing values of the monitors.

    Warns about everything that is still missing. Does not communicate.
    """
    run.results.retry()
    missing = [str(path) for path in run.results.missing]
    if not run.metrics_log.retry():
        missing.append(f"lines of {run.metrics_log.path}")
    if not run.engine.monitor.retry():
        missing.append("figures of the monitors")
    if missing:
        _say(f"WARNING: not written, because of the errors above: {', '.join(missing)}")


def format_summary(summary: dict[str, Any], losses: Collection[str]) -> str:
    """Formats the summary as a table, followed by the paths of the files that were written.

    Args:
        summary: content of summary.json.
        losses: names of the loss terms, whose change is shown in percent. For other metrics, the difference is shown.
    """
    lines = [f"\nFinished {summary['steps']} steps."]
    wide = max([10, *map(len, summary["validation"])])
    if summary["validation"]:
        has_entropies = any("unigram_entropy" in row for row in summary["validation"].values())
        lines[0] += " Validation loss in nats:" if has_entropies else " Validation means:"
        entropies = f"  {'unigram entropy':>15} {'perplexity':>11}" if has_entropies else ""
        lines.append(f"  {'term':<{wide}} {'first':>8} {'last':>8} {'change':>8}{entropies}")
        for term, row in summary["validation"].items():
            lines.append(_format_row(term, row, wide, is_loss=term.partition("/")[0] in losses))
        if has_entropies:
            lines.append("  (unigram entropy: the best that a predictor can do without looking at the input)")
    else:
        lines[0] += " No stream has validation data (data.*.validation), so no validation loss was measured."
    names = [name for name, value in summary.items() if isinstance(value, str) and value]
    lines.extend(f"{name.replace('_', ' ')}: {summary[name]}" for name in names)
    return "\n".join(lines)


def _format_row(term: str, row: dict[str, float], wide: int, *, is_loss: bool) -> str:
    first, last, entropy = row["first"], row["last"], row.get("unigram_entropy")
    change = f"{last / first - 1:8.1%}" if is_loss and first else f"{last - first:+8.3f}"
    baseline = "" if entropy is None else f"  {entropy:15.3f} {math.exp(entropy):11.1f}"
    return f"  {term:<{wide}} {first:8.3f} {last:8.3f} {change}{baseline}"


def _summarize(run: Run, records: list[dict[str, Any]], baselines: dict[str, float]) -> dict[str, Any]:
    validation = [record for record in records if record["kind"] == "validation"]
    rows: dict[str, dict[str, float]] = {}
    # Terms, then the task's metrics, each followed by its sources or kinds if there are several ("TERM/SOURCE").
    keys = [key for key in validation[-1] if key not in ("step", "kind")] if validation else []
    order = list(dict.fromkeys([*(term.name for term in run.terms), *(key.partition("/")[0] for key in keys)]))
    for key in sorted(keys, key=lambda key: order.index(key.partition("/")[0])):
        first = next(record[key] for record in validation if key in record)  # the validation files may have changed
        rows[key] = {"first": first, "last": validation[-1][key]}
        rows[key] |= {"unigram_entropy": baselines[key]} if key in baselines else {}
    steps = validation[-1]["step"] if run.best.is_exhausted else run.config.training.total_steps
    return {"steps": steps, "validation": rows}


def _write_json(content: dict[str, Any], path: Path) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def _say(line: str) -> None:
    print(line, flush=True)
