"""Ranges of numbers, declared beside a field as `Annotated[int, Range(...)]`, and the usual ones by name."""

from dataclasses import dataclass
from typing import Annotated

LARGEST_INT = 2**63 - 1
"""What torch, numpy and DeepSpeed can hold as an integer."""


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; NaN and the infinities belong to no range."""

    low: float
    high: float = LARGEST_INT
    above: bool = False
    """Leaves `low` itself out."""
    below: bool = False
    """Leaves `high` itself out."""

    def __contains__(self, value: float) -> bool:
        is_low_enough = value < self.high if self.below else value <= self.high
        is_high_enough = value > self.low if self.above else value >= self.low
        return is_low_enough and is_high_enough and abs(value) != float("inf")

    def __str__(self) -> str:
        """The rule as words that follow "must be"."""
        low = f"above {self.low:g}" if self.above else f"at least {show_number(self.low)}"
        if self.high >= LARGEST_INT:
            return low
        if not self.above and not self.below:
            return f"between {show_number(self.low)} and {show_number(self.high)}"
        high = f"below {self.high:g}" if self.below else f"at most {show_number(self.high)}"
        return f"{low} and {high}"


def show_number(value: float) -> str:
    """A number as a person would write it, without thousands of digits."""
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else f"a number of {len(str(abs(value)))} digits"
    return f"{value:g}"


Count = Annotated[int, Range(0)]
"""Zero or more."""
Positive = Annotated[int, Range(1)]
"""One or more."""
Share = Annotated[float, Range(0, 1)]
"""A share or a probability."""
Seconds = Annotated[int, Range(1, 30 * 24 * 3600)]
"""A time to wait: up to thirty days, which sockets and process groups can still count in milliseconds."""
Seed = Annotated[int, Range(0, LARGEST_INT)]
"""What torch, numpy and random all take."""
