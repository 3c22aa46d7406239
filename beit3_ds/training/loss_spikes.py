"""Finds steps with a loss far above the losses of the steps before."""

from collections import deque
from typing import Any

import numpy as np

WINDOW = 100
_AT_LEAST = 20
_SPREADS = 6
_SHARE = 0.02  # fraction of the median; ignores small increases when losses hardly vary
_DEVIATIONS_PER_SPREAD = 1.4826  # for a normal distribution


class LossSpikes:
    """Compares each loss, from the 21st on, with the median of up to 100 earlier losses.

    A spike exceeds the median by more than 6 spreads and by more than 2 %. The spread is the median absolute deviation,
    scaled to the standard deviation of a normal distribution; a single spike hardly changes it. Spikes are only
    reported and counted. The count restarts with the process.
    """

    def __init__(self) -> None:
        self.total = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def find(self, losses: list[tuple[int, float]]) -> list[dict[str, Any]]:
        """Finds spikes among the losses of the steps since the last call.

        Args:
            losses: pairs of step (from 1) and finite loss, in order.

        Returns:
            One record for metrics.jsonl per spike.
        """
        found = []
        for step, loss in losses:
            if len(self._losses) >= _AT_LEAST:
                before = np.array(self._losses)
                median = float(np.median(before))
                spread = _DEVIATIONS_PER_SPREAD * float(np.median(np.abs(before - median)))
                if loss - median > max(_SPREADS * spread, _SHARE * abs(median)):
                    found.append({"step": step, "kind": "loss_spike", "loss": loss, "median": median, "spread": spread})
            self._losses.append(loss)
        self.total += len(found)
        return found


def format_spike(record: dict[str, Any]) -> str:
    """Formats the record of a loss spike as one line."""
    return (
        f"loss spike at step {record['step']}: loss {record['loss']:.3f}, median of up to {WINDOW} steps before "
        f"{record['median']:.3f}, spread {record['spread']:.3f}. Its samples are those of step {record['step']} in any "
        "run with this seed and data"
    )
