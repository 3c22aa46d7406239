"""Collects the losses, speeds and other values of training steps, and formats them as progress lines."""

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch, StepBatch
from beit3_ds.parallel import Mesh
from beit3_ds.tasks import Term
from beit3_ds.training.evaluation import mean_terms


class Update(NamedTuple):
    """Holds the results of one training step."""

    sums: Tensor
    """Sum of each loss term on this rank, (terms,) float32."""
    grad_norm: float
    """Norm of all gradients before clipping; not finite if the update was skipped."""
    learning_rate: float
    """Learning rate of the step."""
    loss: Tensor
    """This rank's share of the loss, a scalar. The sum over all ranks is the loss of the step."""

    @property
    def is_skipped(self) -> bool:
        """Returns whether the update was skipped; equal on all ranks."""
        return not math.isfinite(self.grad_norm)


OTHER_FIGURES = frozenset(
    {"step", "learning_rate", "grad_norm", "samples_per_second", "tokens_per_second", "mfu", "memory_gib", "data_wait"}
    | {"seconds_left", "broken_records", "skipped_steps", "loss_spikes"}
)
"""Keys of a progress record that are not losses."""


@dataclass
class Interval:
    """Holds the losses, times and counts of this rank's steps since the last progress line."""

    steps: int = 0
    updates: list[tuple[int, Update]] = field(default_factory=list)
    """Steps whose update was not skipped, as pairs of step number (from 1) and `Update`."""
    seconds: float = 0.0
    data_seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    sums: float | Tensor = 0.0
    """Sum of each loss term over the steps in `updates`, (terms,) float64, on the device of `Update.sums`; 0.0 if
    `updates` is empty."""
    counts: float | Tensor = 0.0
    """Number of predictions per loss term over the steps in `updates`, (terms,) float64; 0.0 if `updates` is empty."""


class Progress:
    """Accumulates the losses, times and counts of the steps between two progress lines."""

    def __init__(
        self,
        terms: Sequence[Term],
        flops_of: Callable[[PackedBatch], float],
        total_steps: int,
        peak_flops: float,
        mesh: Mesh,
    ) -> None:
        """Starts an empty interval.

        Args:
            terms: loss terms of the task.
            flops_of: function that returns the floating-point operations of a micro-batch, forward and backward.
            total_steps: total number of steps of the run, for the remaining time.
            peak_flops: peak FLOP/s of one rank's device, for MFU.
            mesh: mesh of all ranks, over which losses and counts are summed.
        """
        self.terms, self.flops_of = terms, flops_of
        self.total_steps, self.peak_flops, self.mesh = total_steps, peak_flops, mesh
        self.interval = Interval()

    @property
    def has_updates(self) -> bool:
        """Returns whether there is a loss to report. There is none if every step after the last progress line was
        skipped.
        """
        return bool(self.interval.updates)

    def add(self, step_batch: StepBatch, update: Update, data_seconds: float, seconds: float) -> None:
        """Adds a finished step. If the step was skipped, its time and operations are added, but not its losses.

        Args:
            step_batch: this rank's samples of the step.
            update: results of the step.
            data_seconds: seconds that the step waited for data.
            seconds: seconds of the whole step, including `data_seconds`.
        """
        interval = self.interval
        interval.steps += 1
        interval.seconds += seconds
        interval.data_seconds += data_seconds
        for batch in step_batch.micro_batches:
            interval.samples += batch.num_sequences
            interval.tokens += batch.num_rows
            interval.flops += self.flops_of(batch)
        if not update.is_skipped:
            interval.updates.append((step_batch.step + 1, update))
            interval.sums = interval.sums + update.sums.double()  # `report` waits for the device
            for batch in step_batch.micro_batches:
                interval.counts = interval.counts + torch.tensor(batch.term_counts, dtype=torch.float64)

    def losses(self) -> list[tuple[int, float]]:
        """Returns (step, loss) for each step since the last progress line, without skipped steps.

        All ranks must call this method. The ranks sum one number per step.
        """
        losses = torch.stack([update.loss for _, update in self.interval.updates]).double().cpu()
        steps = [step for step, _ in self.interval.updates]
        return list(zip(steps, self.mesh.host.sum(losses).tolist(), strict=True))

    def report(self, step: int) -> dict[str, Any]:
        """Returns the interval's losses, speeds and other values, and starts a new interval.

        The result is a record for metrics.jsonl. Losses and speeds are those of all ranks. Peak memory and the share of
        time spent waiting for data are those of this rank.

        Args:
            step: number of steps done.
        """
        done, self.interval = self.interval, Interval()
        _, last = done.updates[-1]
        assert isinstance(done.sums, Tensor) and isinstance(done.counts, Tensor), "an interval without updates"
        terms = mean_terms(done.sums, done.counts, self.terms, self.mesh)
        work = torch.tensor([done.samples, done.tokens, done.flops], dtype=torch.float64)
        samples, tokens, flops = self.mesh.data_host.sum(work).tolist()
        return {
            "step": step,
            "kind": "train",
            "loss": sum(term.weight * terms[term.name] for term in self.terms if term.name in terms),
            **terms,
            "learning_rate": last.learning_rate,
            "grad_norm": last.grad_norm,
            "samples_per_second": samples / done.seconds,
            "tokens_per_second": tokens / done.seconds,
            "mfu": flops / done.seconds / (self.peak_flops * self.mesh.num_ranks),
            "memory_gib": peak_memory_gib(),
            "data_wait": done.data_seconds / done.seconds,
            "seconds_left": (self.total_steps - step) * done.seconds / done.steps,
        }


def format_line(record: dict[str, Any], total_steps: int, terms: Sequence[Term]) -> str:
    """Formats a training record as one progress line."""
    shown = "  ".join(f"{term.name} {record[term.name]:.3f}" for term in terms if term.name in record)
    broken = f" | broken records {record['broken_records']}" if record.get("broken_records") else ""
    left = time.strftime("%H:%M:%S", time.gmtime(record["seconds_left"]))
    if record["seconds_left"] >= 86400:
        left = f"{int(record['seconds_left'] // 86400)}d {left}"
    return (
        f"step {record['step']}/{total_steps} | loss {record['loss']:.3f} | {shown} | "
        f"lr {record['learning_rate']:.2e} | grad norm {record['grad_norm']:.2f} | "
        f"{record['samples_per_second']:.0f} samples/s | {record['tokens_per_second']:.0f} tokens/s | "
        f"MFU {record['mfu']:.0%} | {record['memory_gib']:.1f} GiB | "
        f"data wait {record['data_wait']:.0%}{broken} | left {left}"
    )


def format_evaluation(record: dict[str, Any], terms: Sequence[Term]) -> str:
    """Formats validation losses and metrics as one line.

    If a loss or metric also has values per source, per question type or per answer type, they follow in parentheses:
    "text_mlm 2.100 (books 2.000, wiki 2.200)".
    """
    shown = []
    metrics = [key for key in record if key not in ("step", "kind") and "/" not in key]
    for name in dict.fromkeys([*(term.name for term in terms if term.name in record), *metrics]):
        sources = [(key.partition("/")[2], mean) for key, mean in record.items() if key.startswith(f"{name}/")]
        each = f" ({', '.join(f'{source} {mean:.3f}' for source, mean in sources)})" if sources else ""
        shown.append(f"{name} {record[name]:.3f}{each}")
    return f"validation at step {record['step']} | {'  '.join(shown)}"


def peak_memory_gib() -> float:
    """Returns the peak memory of this rank in GiB. On a GPU, this is the allocated GPU memory; otherwise, the memory of
    the process.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
