"""Finds ranks that are slower than other ranks."""

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
    """Iterates over the steps that this rank reads, and measures the wait for each step."""

    def __init__(self, steps: Iterable[StepBatch]) -> None:
        self._steps, self.stopwatch = steps, Stopwatch(torch.device("cpu"))

    def __iter__(self) -> Iterator[StepBatch]:
        """Yields the steps. The stopwatch measures each wait."""
        iterator = iter(self._steps)
        while True:
            with self.stopwatch.running():
                step_batch = next(iterator, None)
            if step_batch is None:
                return
            yield step_batch


class Stragglers:
    """Compares the times that ranks spend before they wait for each other.

    The duration of a whole step shows no straggler, because all ranks wait for the slowest. Two other times are
    compared among the ranks of each pipeline stage, which should do the same work:

    * "data": the time that a reading rank waits for its data workers and disks.
    * "work": the time to move batches to the device and, on the stage with the head, to encode images as visual tokens.
      Under ZeRO-0 to 2 without tensor parallelism, this time includes the forward passes of the model.

    The comparison finds devices and hosts that are always slow, and ranks that have more work than they should. It does
    not find slow backward passes, updates or networks. Under ZeRO-3 or tensor parallelism, forward passes wait for
    other ranks, so "work" does not include them. Under tensor parallelism, encoding ends with an all-gather of the
    visual tokens, so "work" includes the wait for the slowest tensor-parallel rank.
    """

    def __init__(self, mesh: Mesh, work: Stopwatch, data: Stopwatch) -> None:
        """Stores the mesh and the stopwatches of this rank.

        Args:
            mesh: mesh of all ranks.
            work: stopwatch of the "work" time; the schedule runs it.
            data: stopwatch of the "data" time; `TimedSteps` runs it.
        """
        self._mesh, self._stopwatches = mesh, (work, data)

    def report(self, steps: int, step_seconds: float) -> tuple[dict[str, Any], list[str]]:
        """Compares the ranks' "data" times, and their "work" times, since the last report. All ranks must call this
        method. The ranks sum a host tensor with 2 numbers per rank.

        Each time is compared with its median over the ranks of the same pipeline stage. A rank is a straggler if one of
        its times exceeds the median by more than 50 % and by more than 5 % of the step time.

        Args:
            steps: number of steps since the last report.
            step_seconds: mean seconds per step.

        Returns:
            Values for metrics.jsonl, and lines about the stragglers. For each kind of time, up to four lines name one
            straggler each, and a fifth line gives the number of further stragglers. There are three values per kind of
            time: the rank whose time exceeds the median of its stage by the most seconds, that rank's seconds per step,
            and the median.
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
