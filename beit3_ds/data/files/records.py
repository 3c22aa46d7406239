"""Defines the records of a source that yield no sample: broken samples, and skipped files, members and rows."""

from typing import NamedTuple


class BrokenRecordError(Exception):
    """Reports one unreadable sample; the message names its file, its key and the reason."""


class Skipped(NamedTuple):
    """Counts files, members or rows that are skipped for one reason."""

    num_members: int
    """Number of skipped files, members or rows."""
    example: str
    """Name of the first one that was skipped."""
