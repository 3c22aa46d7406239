"""What a finished run leaves behind: plot, predictions and a summary."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

from beit3_ds.batch import LOSS_TERMS
from beit3_ds.model import Logits
from beit3_ds.tokenizers.text import TextTokenizer
from beit3_ds.training.evaluation import heldout_source_names, unigram_entropies
from beit3_ds.training.loop import Run
from beit3_ds.training.plot import plot_losses
from beit3_ds.training.predictions import write_predictions


def write_report(run: Run, text_tokenizer: TextTokenizer) -> None:
    """Writes losses.png, predictions.html and summary.json into the output folder and prints the summary.

    All ranks call it, for the forward pass and the held-out entropies need them all.
    """
    folder = Path(run.config.training.output_dir)
    names = heldout_source_names(run.config.data)
    baselines = unigram_entropies(run.heldout, run.visual_tokenizer, run.config.model, run.mesh, run.device, names)
    _write_predictions(run, text_tokenizer, folder / "predictions.html")
    teacher = run.visual_tokenizer.teacher_description if run.visual_tokenizer else None
    teacher = run.mesh.pipeline.host.broadcast(teacher, source=-1)
    if not run.mesh.is_main:
        return
    records = run.history.records()
    plot_losses(records, baselines, folder / "losses.png")
    summary = _summarize(run, records, baselines, folder, teacher)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(format_summary(summary), flush=True)


def format_summary(summary: dict[str, Any]) -> str:
    """The summary as a table a person can read."""
    lines = [f"\nFinished {summary['steps']} steps. Held-out loss in nats:"]
    wide = max([10, *map(len, summary["heldout"])])
    lines.append(
        f"  {'term':<{wide}} {'first':>8} {'last':>8} {'change':>8}  {'unigram entropy':>15} {'perplexity':>11}"
    )
    for term, row in summary["heldout"].items():
        lines.append(
            f"  {term:<{wide}} {row['first']:8.3f} {row['last']:8.3f} {row['last'] / row['first'] - 1:8.1%}  "
            f"{row['unigram_entropy']:15.3f} {math.exp(row['unigram_entropy']):11.1f}"
        )
    lines.append("  (unigram entropy: the best that a predictor can do without looking at the input)")
    lines.extend(f"{name.replace('_', ' ')}: {summary[name]}" for name in _NAMED_LINES)
    return "\n".join(lines)


_NAMED_LINES = ("visual_tokenizer_teacher", "checkpoint", "plot", "predictions", "metrics")


def _summarize(
    run: Run, records: list[dict[str, Any]], baselines: dict[str, float], folder: Path, teacher: str
) -> dict[str, Any]:
    heldout = [record for record in records if record["kind"] == "heldout"]
    # A term, then its sources if there are several ("TERM/SOURCE"); all that both evaluations have.
    both = [key for key in baselines if heldout and key in heldout[0] and key in heldout[-1]]
    terms = [key for term in LOSS_TERMS for key in both if key.partition("/")[0] == term]
    rows = {
        term: {"first": heldout[0][term], "last": heldout[-1][term], "unigram_entropy": baselines[term]}
        for term in terms
    }
    return {
        "steps": run.config.training.total_steps,
        "heldout": rows,
        "visual_tokenizer_teacher": teacher,
        "checkpoint": str(run.store.newest_path()),
        "plot": str(folder / "losses.png"),
        "predictions": str(folder / "predictions.html"),
        "metrics": str(run.history.path),
    }


def _write_predictions(run: Run, text_tokenizer: TextTokenizer, path: Path) -> None:
    """The first rank with heads writes: it has the logits, the codes and the tokenizer's view."""
    first_batch = itertools.islice(run.heldout, 1)
    for batch, logits in run.schedule.run_forward(first_batch, None, run.prepare):
        if isinstance(logits, Logits) and run.mesh.data_parallel_rank == 0 and run.mesh.tensor.rank == 0:
            assert run.visual_tokenizer is not None
            write_predictions(batch, logits, text_tokenizer, run.visual_tokenizer, path)
