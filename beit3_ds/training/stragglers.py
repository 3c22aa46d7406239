"""Ranks that work more slowly than the others."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from beit3_ds.batch import StepBatch
from beit3_ds.parallel import Mesh
from beit3_ds.pipeline.stopwatch import Stopwatch

_TIMES_MEDIAN = 1.5
_SHARE_OF_STEP = 0.05
_LISTED = 4
_MEASURES = {"work": "its own work", "data": "its data"}


class TimedSteps:
    """Steps that a rank reads itself, with the time that it waits for them."""

    def __init__(self, steps: Iterable[StepBatch]) -> None:
        self._steps, self.stopwatch = steps, Stopwatch(torch.device("cpu"))

    def __iter__(self) -> Iterator[StepBatch]:
        """Yields the steps."""
        iterator = iter(self._steps)
        while True:
            with self.stopwatch.running():
                step_batch = next(iterator, None)
            if step_batch is None:
                return
            yield step_batch


class Stragglers:
    """Compares what ranks do before they wait for each other: the times of whole steps are equal on all of them.

    Two times are taken. "data": what a rank that reads waits for its step, that is for its worker processes and disks.
    "work": moving batches to the device and the visual tokenizer's forward pass, and under ZeRO-0 to 2 without tensor
    parallelism also the model's forward passes; other passes wait for other ranks in between. It shows a device or a
    host that is slow all the time, or a rank with more work. It does not show what is slow in backward passes, in the
    update or on the network alone, nor, under ZeRO-3 or tensor parallelism, anything on stages without heads; and ranks
    are compared with those of their own stage only, which do the same work.
    """

    def __init__(self, mesh: Mesh, work: Stopwatch, data: Stopwatch) -> None:
        """Takes the stopwatches of this rank, which others run."""
        self._mesh, self._stopwatches = mesh, (work, data)

    def report(self, steps: int, step_seconds: float) -> tuple[dict[str, Any], list[str]]:
        """Compares the time since the last report. All ranks call it; sends 2 numbers a rank.

        Args:
            steps: in that time.
            step_seconds: that one took.

        Returns:
            Figures for metrics.jsonl: of each measure the rank that is most above the median of its stage, its seconds
            a step and that median. And a line for each rank that is clearly above it: by half of the median, and by a
            twentieth of the step.
        """
        seconds = torch.zeros(self._mesh.num_ranks, len(_MEASURES), dtype=torch.float64)
        seconds[self._mesh.host.rank] = torch.tensor([stopwatch.take() / steps for stopwatch in self._stopwatches])
        return self._compare(self._mesh.host.sum(seconds), step_seconds)

    def _compare(self, seconds: torch.Tensor, step_seconds: float) -> tuple[dict[str, Any], list[str]]:
        figures: dict[str, Any] = {}
        lines: list[str] = []
        # Ranks are numbered stage by stage.
        stages = seconds.view(self._mesh.pipeline.size, -1, len(_MEASURES))
        medians = stages.median(dim=1, keepdim=True).values.expand_as(stages).flatten(0, 1)
        for column, (measure, words) in enumerate(_MEASURES.items()):
            own, median = seconds[:, column], medians[:, column]
            worst = int((own - median).argmax())
            figures |= {
                f"{measure}_seconds": float(own[worst]),
                f"{measure}_seconds_median": float(median[worst]),
                f"{measure}_slowest_rank": worst,
            }
            is_slow = (own > _TIMES_MEDIAN * median) & (own - median > _SHARE_OF_STEP * step_seconds)
            slow = sorted(is_slow.nonzero().flatten().tolist(), key=lambda rank: -float(own[rank]))
            lines += [
                f"straggler: {self._mesh.describe(rank)} takes {own[rank]:.3f} s a step for {words}, the median of its "
                f"stage is {median[rank]:.3f} s (a step takes {step_seconds:.3f} s)"
                for rank in slow[:_LISTED]
            ]
            if len(slow) > _LISTED:
                lines.append(f"straggler: and {len(slow) - _LISTED} more ranks for {words}")
        return figures, lines
