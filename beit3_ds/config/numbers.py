"""Declares ranges of numbers for annotations such as `Annotated[int, Range(...)]`, and names the usual ones."""

from dataclasses import dataclass
from typing import Annotated

LARGEST_INT = 2**63 - 1
"""Largest integer that torch, numpy and DeepSpeed can hold."""


@dataclass(frozen=True)
class Range:
    """Describes the numbers from `low` to `high`; NaN and the infinities belong to no range."""

    low: float
    high: float = LARGEST_INT
    above: bool = False
    """Whether the range excludes `low` itself."""
    below: bool = False
    """Whether the range excludes `high` itself."""

    def __contains__(self, value: float) -> bool:
        is_low_enough = value < self.high if self.below else value <= self.high
        is_high_enough = value > self.low if self.above else value >= self.low
        return is_low_enough and is_high_enough and abs(value) != float("inf")

    def __str__(self) -> str:
        """Returns the rule as words that follow "must be"."""
        low = f"above {self.low:g}" if self.above else f"at least {show_number(self.low)}"
        if self.high >= LARGEST_INT:
            return low
        if not self.above and not self.below:
            return f"between {show_number(self.low)} and {show_number(self.high)}"
        high = f"below {self.high:g}" if self.below else f"at most {show_number(self.high)}"
        return f"{low} and {high}"


def show_number(value: float) -> str:
    """Returns a number as a person would write it, without thousands of digits."""
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else f"a number of {len(str(abs(value)))} digits"
    return f"{value:g}"


RANKS = Range(1, 2**20)
"""Processes of a run."""
PROCESSES = Range(1, 1024)
"""Processes of one machine."""

Count = Annotated[int, Range(0)]
"""An integer from 0 on."""
Positive = Annotated[int, Range(1)]
"""An integer from 1 on."""
Size = Annotated[int, Range(1, 2**18)]
"""A width, a side in pixels or a length; larger values are mistakes and would overflow counts of elements."""
Layers = Annotated[int, Range(1, 1000)]
"""Blocks of a network."""
Vocabulary = Annotated[int, Range(2, 2**24)]
"""Rows of a table, up to the largest number that float32 counts exactly."""
Samples = Annotated[int, Range(1, 2**24)]
"""Samples of a step."""
Steps = Annotated[int, Range(1, 10**12)]
"""Optimizer steps."""
Ranks = Annotated[int, RANKS]
"""Number of processes of a run."""
Share = Annotated[float, Range(0, 1)]
"""A share or a probability."""
MaskRatio = Annotated[float, Range(0.01, 0.99)]
"""A share that leaves something masked and something visible."""
StandardDeviation = Annotated[float, Range(0, 10, above=True)]
"""Standard deviation of initial values."""
LearningRate = Annotated[float, Range(0, 1, above=True)]
"""A learning rate: AdamW moves every weight by about this much per step."""
FinalLearningRate = Annotated[float, Range(0, 1)]
"""A learning rate that may be zero."""
LearningRateScale = Annotated[float, Range(0, 1e4, above=True)]
"""A factor of the learning rate of some parameters."""
LayerDecay = Annotated[float, Range(0, 1, above=True)]
"""A factor of the learning rate per layer; 1 gives all layers the same rate."""
WeightDecay = Annotated[float, Range(0, 10)]
"""Share of a weight that a step subtracts from it, in units of the learning rate."""
Decay = Annotated[float, Range(0, 1, below=True)]
"""Share of a moving average that each step keeps; with 1 it would never move."""
Epsilon = Annotated[float, Range(0, 0.1, above=True)]
"""A number added to a denominator to keep it above zero."""
Weight = Annotated[float, Range(0, 1e6)]
"""A factor of a term of the loss."""
Seconds = Annotated[int, Range(1, 30 * 24 * 3600)]
"""A waiting time of up to thirty days, which sockets and process groups can still count in milliseconds."""
Seed = Annotated[int, Range(0, LARGEST_INT)]
"""A seed that both torch and numpy accept."""
