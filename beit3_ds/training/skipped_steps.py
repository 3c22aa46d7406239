"""Counts steps that were skipped because a loss or gradient was not finite, and finds the ranks at fault."""

from typing import Any

from beit3_ds.batch import StepBatch
from beit3_ds.parallel import Mesh
from beit3_ds.pipeline.gradient_probe import GradientProbe

_LISTED = 8  # maximum number of printed ranks, and of samples per rank; the record has all


class NonFiniteLossError(RuntimeError):
    """Reports too many consecutive skipped steps: training has diverged, or a device is faulty."""


class SkippedSteps:
    """Counts skipped steps, and finds the ranks that caused them. All ranks must call all methods together."""

    def __init__(self, limit: int, mesh: Mesh) -> None:
        """Starts with counts of zero.

        Args:
            limit: number of consecutive skipped steps at which the run stops (`training.max_skipped_steps`).
            mesh: mesh of all ranks.
        """
        self.limit, self._mesh = limit, mesh
        self.total, self.in_a_row = 0, 0

    @property
    def are_too_many(self) -> bool:
        """Returns whether the number of consecutive skipped steps has reached the limit."""
        return self.in_a_row >= self.limit

    def note_update(self) -> None:
        """Resets the number of consecutive skipped steps. Call this after each update."""
        self.in_a_row = 0

    def add(self, step_batch: StepBatch, grad_norm: float, probe: GradientProbe) -> dict[str, Any]:
        """Counts a skipped step, and finds the ranks whose own gradients are non-finite.

        Sends the sample names of the micro-batches with non-finite gradients to all ranks.

        Returns:
            Record for metrics.jsonl. The entry "ranks" has one item for each rank with non-finite gradients: the rank's
            number and name, and the index and sample names of each micro-batch with non-finite gradients. The entry is
            empty if the gradients of all ranks were finite but the sum over the ranks was not.
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
        """Formats the record returned by `add` as readable lines."""
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
            lines.append("  Each rank's own gradients are finite: their sum overflowed, or was corrupted in transit.")
        return "\n".join(lines)


def _describe_rank(rank: dict[str, Any]) -> str:
    numbers = ", ".join(str(found["micro_batch"]) for found in rank["micro_batches"])
    names = [name for found in rank["micro_batches"] for name in found["samples"]]
    listed = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    return f"  not finite on {rank['name']}, micro-batch {numbers}, of the samples {listed or '(none)'}"
