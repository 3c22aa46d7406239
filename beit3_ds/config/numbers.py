"""Defines `Range` for annotations such as `Annotated[int, Range(1)]`, and names for common number types."""

from dataclasses import dataclass
from typing import Annotated

LARGEST_INT = 2**63 - 1
"""Largest signed 64-bit integer; torch, numpy and DeepSpeed fail on larger ones."""


@dataclass(frozen=True)
class Range:
    """Describes a range of finite numbers from `low` to `high`."""

    low: float
    high: float = LARGEST_INT
    above: bool = False
    """Whether the range excludes `low`."""
    below: bool = False
    """Whether the range excludes `high`."""

    def __contains__(self, value: float) -> bool:
        is_low_enough = value < self.high if self.below else value <= self.high
        is_high_enough = value > self.low if self.above else value >= self.low
        return is_low_enough and is_high_enough and abs(value) != float("inf")

    def __str__(self) -> str:
        """Returns a description of the range, which error messages put after "must be"."""
        low = f"above {self.low:g}" if self.above else f"at least {show_number(self.low)}"
        if self.high >= LARGEST_INT:
            return low
        if not self.above and not self.below:
            return f"between {show_number(self.low)} and {show_number(self.high)}"
        high = f"below {self.high:g}" if self.below else f"at most {show_number(self.high)}"
        return f"{low} and {high}"


def show_number(value: float) -> str:
    """Returns a short, readable form of a number. Integers of more than 20 digits are described by their length."""
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else f"a number of {len(str(abs(value)))} digits"
    return f"{value:g}"


RANKS = Range(1, 2**20)
"""Valid numbers of ranks of a run."""
PROCESSES = Range(1, 1024)
"""Valid numbers of processes on one machine."""

Count = Annotated[int, Range(0)]
"""Integer of at least 0."""
Positive = Annotated[int, Range(1)]
"""Integer of at least 1."""
Size = Annotated[int, Range(1, 2**18)]
"""Number of features, side in pixels, or length. Larger values would overflow element counts."""
Layers = Annotated[int, Range(1, 1000)]
"""Number of blocks of a network."""
Vocabulary = Annotated[int, Range(2, 2**24)]
"""Vocabulary size, at most 2**24, the largest integer up to which float32 represents all integers."""
Samples = Annotated[int, Range(1, 2**24)]
"""Number of samples per step."""
Steps = Annotated[int, Range(1, 10**12)]
"""Number of optimizer steps."""
Ranks = Annotated[int, RANKS]
"""Number of ranks."""
Share = Annotated[float, Range(0, 1)]
"""Fraction or probability, from 0 to 1."""
MaskRatio = Annotated[float, Range(0.01, 0.99)]
"""Fraction of positions to mask, neither 0 nor 1."""
StandardDeviation = Annotated[float, Range(0, 10, above=True)]
"""Standard deviation of initial values."""
LearningRate = Annotated[float, Range(0, 1, above=True)]
"""Learning rate above 0. AdamW changes each weight by about this amount per step."""
FinalLearningRate = Annotated[float, Range(0, 1)]
"""Learning rate that may be 0."""
LearningRateScale = Annotated[float, Range(0, 1e4, above=True)]
"""Factor on the learning rate of some parameters."""
LayerDecay = Annotated[float, Range(0, 1, above=True)]
"""Ratio of a layer's learning rate to that of the next layer, which is closer to the output. With 1, all layers have
the same learning rate."""
WeightDecay = Annotated[float, Range(0, 10)]
"""Weight decay. Each step subtracts learning rate x weight decay x weight from each weight."""
Decay = Annotated[float, Range(0, 1, below=True)]
"""Number from 0 to below 1, such as the decay of a moving average."""
Epsilon = Annotated[float, Range(0, 0.1, above=True)]
"""Small positive number added to a denominator to avoid division by zero."""
Weight = Annotated[float, Range(0, 1e6)]
"""Factor on a loss term."""
Seconds = Annotated[int, Range(1, 30 * 24 * 3600)]
"""Timeout in seconds, at most 30 days; much longer timeouts overflow the milliseconds of sockets and process groups."""
Seed = Annotated[int, Range(0, LARGEST_INT)]
"""Seed that torch and numpy accept."""
