"""What a finished run leaves behind: plot, predictions and a summary."""

import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

from beit3_ds.atomic_file import atomic_write
from beit3_ds.batch import LOSS_TERMS
from beit3_ds.model import Logits
from beit3_ds.tokenizers.text import TextTokenizer
from beit3_ds.training.evaluation import unigram_entropies, validation_source_names
from beit3_ds.training.loop import Run
from beit3_ds.training.picture import try_to_write
from beit3_ds.training.plot import plot_losses
from beit3_ds.training.predictions import write_predictions


def write_report(run: Run, text_tokenizer: TextTokenizer | None) -> None:
    """Writes losses.png, predictions.html and summary.json into the output folder and prints the summary.

    A file that cannot be written is reported in one line, and the run still counts as finished. All ranks call it,
    because the forward pass and the validation entropies need them all.
    """
    folder = Path(run.config.training.output_dir)
    names = validation_source_names(run.config.data)
    baselines = unigram_entropies(run.validation, run.visual_tokenizer, run.config.model, run.mesh, run.device, names)
    predictions = _write_predictions(run, text_tokenizer, folder / "predictions.html")
    teacher = run.visual_tokenizer.teacher_description if run.visual_tokenizer else None
    teacher, predictions = run.mesh.pipeline.host.broadcast((teacher, predictions), src=-1)
    if not run.mesh.is_main:
        return
    records = run.metrics_log.records()
    plot = try_to_write(folder / "losses.png", lambda path: plot_losses(records, baselines, path), _say)
    summary = _summarize(run, records, baselines)
    summary |= {"visual_tokenizer_teacher": teacher, "checkpoint": str(run.store.newest_path())}
    summary |= {"plot": str(folder / "losses.png")} if plot else {}
    summary |= {"predictions": predictions} if predictions else {}
    summary["metrics"] = str(run.metrics_log.path)
    try_to_write(folder / "summary.json", lambda path: _write_json(summary, path), _say)
    _say(format_summary(summary))


def format_summary(summary: dict[str, Any]) -> str:
    """Formats the summary as a readable table, which names only files that were written."""
    lines = [f"\nFinished {summary['steps']} steps."]
    wide = max([10, *map(len, summary["validation"])])
    if summary["validation"]:
        lines[0] += " Validation loss in nats:"
        lines.append(
            f"  {'term':<{wide}} {'first':>8} {'last':>8} {'change':>8}  {'unigram entropy':>15} {'perplexity':>11}"
        )
        lines += [_format_row(term, row, wide) for term, row in summary["validation"].items()]
        lines.append("  (unigram entropy: the best that a predictor can do without looking at the input)")
    else:
        lines[0] += " No stream has validation data (data.*.validation), so no validation loss was measured."
    lines.extend(f"{name.replace('_', ' ')}: {summary[name]}" for name in _NAMED_LINES if summary.get(name))
    return "\n".join(lines)


_NAMED_LINES = ("visual_tokenizer_teacher", "checkpoint", "plot", "predictions", "metrics")


def _format_row(term: str, row: dict[str, float], wide: int) -> str:
    first, last, entropy = row["first"], row["last"], row.get("unigram_entropy")
    change = f"{last / first - 1:8.1%}" if first else " " * 8
    baseline = "" if entropy is None else f"  {entropy:15.3f} {math.exp(entropy):11.1f}"
    return f"  {term:<{wide}} {first:8.3f} {last:8.3f} {change}{baseline}"


def _summarize(run: Run, records: list[dict[str, Any]], baselines: dict[str, float]) -> dict[str, Any]:
    validation = [record for record in records if record["kind"] == "validation"]
    rows: dict[str, dict[str, float]] = {}
    # A term, then its sources if there are several ("TERM/SOURCE").
    keys = [key for key in validation[-1] if key.partition("/")[0] in LOSS_TERMS] if validation else []
    for key in sorted(keys, key=lambda key: LOSS_TERMS.index(key.partition("/")[0])):
        first = next(record[key] for record in validation if key in record)  # the validation files may have changed
        rows[key] = {"first": first, "last": validation[-1][key]}
        rows[key] |= {"unigram_entropy": baselines[key]} if key in baselines else {}
    return {"steps": run.config.training.total_steps, "validation": rows}


def _write_predictions(run: Run, text_tokenizer: TextTokenizer | None, path: Path) -> str | None:
    """Writes the page of predictions on the first rank with heads, which has logits, codes and the tokenizer's view.

    Returns:
        The page's path on that rank if it was written, else None.
    """
    written = False
    first_batch = itertools.islice(run.validation, 1)
    for batch, logits in run.schedule.run_forward(first_batch, None, run.prepare):
        if isinstance(logits, Logits) and run.mesh.data_parallel_rank == 0 and run.mesh.tensor.rank == 0:
            page = functools.partial(write_predictions, batch, logits, text_tokenizer, run.visual_tokenizer)
            written = try_to_write(path, page, _say)
    return str(path) if written else None


def _write_json(content: dict[str, Any], path: Path) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def _say(line: str) -> None:
    print(line, flush=True)
