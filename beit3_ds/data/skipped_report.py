"""Reports the files, members, rows and lines that the sources of a run skip."""

from collections.abc import Mapping
from typing import Any

from beit3_ds.data.files.printing import printable
from beit3_ds.data.files.records import Skipped
from beit3_ds.data.samples import ImageSamples, PairSamples, TextSamples


def describe_skipped(sources: Mapping[str, Any]) -> list[str]:
    """Describes all that the sources of a run skip, in one line per source and reason, with an example.

    Args:
        sources: samples of each source by its name, as `name_sources` returns them.
    """
    return [
        f"{name}: left out {found.num_members:,}: {reason} (such as {printable(found.example)})"
        for name, samples in sources.items()
        for reason, found in _skipped(samples).items()
    ]


def _skipped(samples: object) -> dict[str, Skipped]:
    match samples:
        case ImageSamples():
            return samples.source.skipped
        case PairSamples():
            return samples.images.source.skipped
        case TextSamples(sequences=sequences):
            found = {"line that is no text": sequences.broken, "file without text": sequences.empty}
            return {reason: Skipped(len(names), names[0]) for reason, names in found.items() if names}
    return {}
