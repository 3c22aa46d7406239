"""Defines how data sources report broken samples and skipped items."""

from typing import NamedTuple


class BrokenRecordError(Exception):
    """Reports one unreadable sample; the message names the file, the sample and the reason."""


class Skipped(NamedTuple):
    """Counts the files, tar members or rows that are skipped for one reason."""

    num_members: int
    """Number of skipped files, tar members or rows."""
    example: str
    """Name of one skipped file, tar member or row."""
