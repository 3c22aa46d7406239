"""Describes the files, tar members, rows and lines that a run skips."""

from collections.abc import Mapping

from beit3_ds.data.samples import SourceSamples
from beit3_ds.printing import printable


def describe_skipped(sources: Mapping[str, SourceSamples]) -> list[str]:
    """Returns one line of text per source and reason, with the number of skipped items and an example.

    Args:
        sources: samples of each source by name, from `name_sources`.
    """
    return [
        printable(f"{name}: left out {found.num_members:,}: {reason} (such as {found.example})")
        for name, samples in sources.items()
        for reason, found in samples.skipped().items()
    ]
