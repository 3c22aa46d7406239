"""Reports the files, members, rows and lines that the sources of a run skip."""

from collections.abc import Mapping

from beit3_ds.data.samples import SourceSamples
from beit3_ds.printing import printable


def describe_skipped(sources: Mapping[str, SourceSamples]) -> list[str]:
    """Returns one line per source and reason: the number of skipped files, members, rows or lines, and an example.

    Args:
        sources: samples of each source by its name, as `name_sources` returns them.
    """
    return [
        printable(f"{name}: left out {found.num_members:,}: {reason} (such as {found.example})")
        for name, samples in sources.items()
        for reason, found in samples.skipped().items()
    ]
