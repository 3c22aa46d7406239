"""Defines how sources report broken samples, and files, members and rows that they skip."""

from typing import NamedTuple


class BrokenRecordError(Exception):
    """Reports one unreadable sample; the message names its file, its key and the reason."""


class Skipped(NamedTuple):
    """Counts files, members or rows that are skipped for one reason."""

    num_members: int
    """Number of skipped files, members or rows."""
    example: str
    """Name of the first skipped file, member or row."""
