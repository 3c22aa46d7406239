"""Finds ranks that are slower than the others."""

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
    """Iterates over the steps that this rank reads, and measures how long it waits for each step."""

    def __init__(self, steps: Iterable[StepBatch]) -> None:
        self._steps, self.stopwatch = steps, Stopwatch(torch.device("cpu"))

    def __iter__(self) -> Iterator[StepBatch]:
        """Yields the steps; the stopwatch runs during each wait."""
        iterator = iter(self._steps)
        while True:
            with self.stopwatch.running():
                step_batch = next(iterator, None)
            if step_batch is None:
                return
            yield step_batch


class Stragglers:
    """Compares the times that ranks spend before they wait for each other.

    Times of whole steps show no straggler, because ranks wait for each other and all take equally long. Two times are
    compared, among the ranks of one stage, which do the same work:

    * "data": how long a rank that reads waits for its worker processes and disks.
    * "work": how long a rank moves batches to the device and encodes images as visual tokens. Under ZeRO-0 to 2
      without tensor parallelism, the forward passes of the model count too. Other passes wait for other ranks.

    The comparison finds a device or host that is always slow, and a rank with more work. It does not find slowness
    only in backward passes, in the update or on the network. Under ZeRO-3 or tensor parallelism, it finds nothing on
    stages without heads.
    """

    def __init__(self, mesh: Mesh, work: Stopwatch, data: Stopwatch) -> None:
        """Keeps the stopwatches of this rank, which the schedule and `TimedSteps` start and stop."""
        self._mesh, self._stopwatches = mesh, (work, data)

    def report(self, steps: int, step_seconds: float) -> tuple[dict[str, Any], list[str]]:
        """Compares the times since the last report. All ranks must call this function; sends 2 numbers per rank.

        Args:
            steps: number of steps since the last report.
            step_seconds: mean seconds per step.

        Returns:
            Figures for metrics.jsonl, and lines about stragglers. For each measure, the figures are the slowest rank
            relative to the median of its stage, its seconds per step, and that median. A rank is a straggler if its
            time exceeds the median by more than half of the median and by more than 5 % of the step time.
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
                f"straggler: {self._mesh.describe(rank)} takes {own[rank]:.3f} s per step for {words}, the median of "
                f"its stage is {median[rank]:.3f} s (a step takes {step_seconds:.3f} s)"
                for rank in slow[:_LISTED]
            ]
            if len(slow) > _LISTED:
                lines.append(f"straggler: and {len(slow) - _LISTED} more ranks for {words}")
        return figures, lines
