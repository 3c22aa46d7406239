"""Declares ranges of numbers for annotations such as `Annotated[int, Range(...)]`, and names for common ranges."""

from dataclasses import dataclass
from typing import Annotated

LARGEST_INT = 2**63 - 1
"""Largest 64-bit integer, beyond which torch, numpy and DeepSpeed fail."""


@dataclass(frozen=True)
class Range:
    """Describes the finite numbers from `low` to `high`."""

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
        """Returns a description of the range that completes the sentence "must be ..."."""
        low = f"above {self.low:g}" if self.above else f"at least {show_number(self.low)}"
        if self.high >= LARGEST_INT:
            return low
        if not self.above and not self.below:
            return f"between {show_number(self.low)} and {show_number(self.high)}"
        high = f"below {self.high:g}" if self.below else f"at most {show_number(self.high)}"
        return f"{low} and {high}"


def show_number(value: float) -> str:
    """Returns a short, readable form of a number, even if it has thousands of digits."""
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else f"a number of {len(str(abs(value)))} digits"
    return f"{value:g}"


RANKS = Range(1, 2**20)
"""Range of the number of processes of a run."""
PROCESSES = Range(1, 1024)
"""Range of the number of processes on one machine."""

Count = Annotated[int, Range(0)]
"""An integer that is at least 0."""
Positive = Annotated[int, Range(1)]
"""An integer that is at least 1."""
Size = Annotated[int, Range(1, 2**18)]
"""A number of features, a side in pixels or a length; a larger value would overflow counts of elements."""
Layers = Annotated[int, Range(1, 1000)]
"""Number of blocks of a network."""
Vocabulary = Annotated[int, Range(2, 2**24)]
"""Number of entries of a vocabulary, up to the largest number to which float32 counts exactly."""
Samples = Annotated[int, Range(1, 2**24)]
"""Number of samples of a step."""
Steps = Annotated[int, Range(1, 10**12)]
"""Number of optimizer steps."""
Ranks = Annotated[int, RANKS]
"""Number of processes of a run."""
Share = Annotated[float, Range(0, 1)]
"""A share or a probability."""
MaskRatio = Annotated[float, Range(0.01, 0.99)]
"""A share of masked positions that is neither 0 nor 1."""
StandardDeviation = Annotated[float, Range(0, 10, above=True)]
"""Standard deviation of initial values."""
LearningRate = Annotated[float, Range(0, 1, above=True)]
"""A learning rate above 0; AdamW changes every weight by about this amount per step."""
FinalLearningRate = Annotated[float, Range(0, 1)]
"""A learning rate that may be zero."""
LearningRateScale = Annotated[float, Range(0, 1e4, above=True)]
"""A factor by which the learning rate of some parameters is multiplied."""
LayerDecay = Annotated[float, Range(0, 1, above=True)]
"""A factor of the learning rate per layer below the head; 1 gives all layers the same rate."""
WeightDecay = Annotated[float, Range(0, 10)]
"""A weight decay: each step subtracts learning rate x weight decay x weight from each weight."""
Decay = Annotated[float, Range(0, 1, below=True)]
"""A number from 0 to below 1, such as the share of a moving average that each step keeps."""
Epsilon = Annotated[float, Range(0, 0.1, above=True)]
"""A small positive number that is added to a denominator to keep it above zero."""
Weight = Annotated[float, Range(0, 1e6)]
"""A factor by which a term of the loss is multiplied."""
Seconds = Annotated[int, Range(1, 30 * 24 * 3600)]
"""A time limit in seconds, at most thirty days, which sockets and process groups can still count in milliseconds."""
Seed = Annotated[int, Range(0, LARGEST_INT)]
"""A seed that both torch and numpy accept."""
