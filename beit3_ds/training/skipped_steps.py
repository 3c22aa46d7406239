"""Steps whose update was left out because a loss or a gradient was not finite."""

from typing import Any

from beit3_ds.batch import StepBatch
from beit3_ds.parallel import Mesh
from beit3_ds.pipeline.gradient_probe import GradientProbe

_LISTED = 8  # ranks, and samples of each, in the lines for people; the record has all


class NonFiniteLossError(RuntimeError):
    """Losses or gradients were not finite in too many steps in a row: training has diverged, or a device is broken."""


class SkippedSteps:
    """Counts skipped steps and finds out where they come from; all ranks call it alike, for all know the same norm."""

    def __init__(self, limit: int, mesh: Mesh) -> None:
        """Begins to count.

        Args:
            limit: skipped steps in a row after which the run must stop (`training.max_skipped_steps`).
            mesh: the ranks.
        """
        self.limit, self._mesh = limit, mesh
        self.total, self.in_a_row = 0, 0

    @property
    def are_too_many(self) -> bool:
        """Whether the run must stop."""
        return self.in_a_row >= self.limit

    def note_update(self) -> None:
        """An update was done, so the next skipped step is the first in a row."""
        self.in_a_row = 0

    def add(self, step_batch: StepBatch, grad_norm: float, probe: GradientProbe) -> dict[str, Any]:
        """Counts a skipped step and gathers which ranks' own gradients were not finite, with the samples they saw.

        Sends the names of those samples from every such rank to all.

        Returns:
            The record of metrics.jsonl. "ranks" holds a rank's number and name, and its micro-batches with their
            samples; it is empty if every rank's own gradients were finite, and only their sum was not.
        """
        self.total += 1
        self.in_a_row += 1
        own = [
            {"micro_batch": number, "samples": list(step_batch.micro_batches[number].sample_names)}
            for number in probe.find_non_finite()
        ]
        found = self._mesh.host.gather(own)
        return {
            "step": step_batch.step + 1,
            "kind": "skipped_step",
            "grad_norm": str(grad_norm),  # JSON has neither NaN nor infinity
            "in_a_row": self.in_a_row,
            "ranks": [
                {"rank": rank, "name": self._mesh.describe(rank), "micro_batches": micro_batches}
                for rank, micro_batches in enumerate(found)
                if micro_batches
            ],
        }

    def describe(self, record: dict[str, Any]) -> str:
        """Lines for people about what `add` returned."""
        lines = [
            f"WARNING: step {record['step']} is skipped on all ranks, {record['in_a_row']} in a row (the run stops at "
            f"training.max_skipped_steps={self.limit}): the gradients' norm is {record['grad_norm']}. Weights and "
            "moments stay as they are."
        ]
        ranks = record["ranks"]
        lines += [_describe_rank(rank) for rank in ranks[:_LISTED]]
        if len(ranks) > _LISTED:
            lines.append(f"  and on {len(ranks) - _LISTED} more ranks: see metrics.jsonl")
        if not ranks:
            lines.append("  Each rank's own gradients are finite: their sum is too large, or was damaged on the way.")
        return "\n".join(lines)


def _describe_rank(rank: dict[str, Any]) -> str:
    numbers = ", ".join(str(found["micro_batch"]) for found in rank["micro_batches"])
    names = [name for found in rank["micro_batches"] for name in found["samples"]]
    listed = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    return f"  not finite on {rank['name']}, micro-batch {numbers}, of the samples {listed or '(none)'}"
