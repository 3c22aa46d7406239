"""What the files of a run hold: numbers of samples, sizes, lengths and what is broken."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from beit3_ds.config import DataConfig
from beit3_ds.data.files import expand_patterns
from beit3_ds.data.image_source import BrokenRecord, ImageSource, Skipped, printable
from beit3_ds.data.sources import open_images
from beit3_ds.data.text_files import BrokenLines, read_paragraphs, whole_file
from beit3_ds.data.texts import texts_folder
from beit3_ds.data.token_files import count_tokens

_PERCENTILES = (0, 10, 50, 90, 100)
_REASON_LENGTH = 100


@dataclass(kw_only=True)
class SourceStatistics:
    """Of some samples of one source."""

    num_samples: int
    """Samples of the source."""
    num_examined: int
    """Those that were read."""
    skipped: dict[str, Skipped]
    """What the source leaves out, by reason."""
    numbers: dict[str, list[int]] = field(default_factory=dict)
    """By name: widths and heights of images in pixels, characters and words of captions."""
    broken: Counter[str] = field(default_factory=Counter)
    """Broken samples by reason; one whose image and caption are broken counts in both."""

    def describe(self) -> list[str]:
        """Lines of text; percentiles are those of the readable samples."""
        lines = [f"{self.num_samples:,} samples, {self.num_examined:,} of them examined"]
        for name, numbers in self.numbers.items():
            values = np.percentile(numbers, _PERCENTILES).round().astype(int)
            named = ", ".join(f"{percentile}%: {value}" for percentile, value in zip(_PERCENTILES, values, strict=True))
            lines.append(f"{name}: {named}")
        for reason, count in self.broken.most_common():
            lines.append(f"broken: {count:,} of {self.num_examined:,}: {reason}")
        for reason, found in self.skipped.items():
            lines.append(f"left out: {found.num_members:,}: {reason} (such as {printable(found.example)})")
        return lines


def open_sources(config: DataConfig) -> dict[str, ImageSource]:
    """Opens the sources of images of a run by stream, part and path, such as `pairs train cc3m-*.tar`.

    Raises:
        ConfigError: for files that are missing or cannot be read.
    """
    return {
        f"{name} {part} {source.path}": open_images(source, config.prepared_dir)
        for name, stream in (("images", config.images), ("pairs", config.pairs))
        for part, sources in (("train", stream.train), ("heldout", stream.heldout))
        for source in sources
    }


def examine_source(source: ImageSource, with_captions: bool, max_examined: int) -> SourceStatistics:
    """Reads up to `max_examined` samples, evenly spread over the source."""
    indices = spread(len(source), max_examined)
    statistics = SourceStatistics(num_samples=len(source), num_examined=len(indices), skipped=source.skipped)
    for index in indices:
        try:
            width, height = source.image(index).size
            _add(statistics, {"image width": width, "image height": height})
        except BrokenRecord as error:
            statistics.broken[_reason(str(error).removeprefix(f"{source.name(index)}: "))] += 1
        if not with_captions:
            continue
        try:
            caption = source.caption(index)
            _add(statistics, {"caption characters": len(caption), "caption words": len(caption.split())})
        except BrokenRecord as error:
            statistics.broken[_reason(str(error).removeprefix(f"{source.name(index)}: "))] += 1
    return statistics


def describe_streams(config: DataConfig, max_examined: int) -> str:
    """Describes all files of a run, training and held-out.

    Args:
        config: names the files.
        max_examined: samples of each stream's part that are read, evenly spread; paragraphs of texts are the first ones
            of every file.

    Raises:
        ConfigError: for files that are missing or cannot be read.
    """
    lines: list[str] = []
    for name, source in open_sources(config).items():
        statistics = examine_source(source, name.startswith("pairs"), max_examined)
        lines += [f"{name}:", *(f"  {line}" for line in statistics.describe())]
    for part, sources in (("train", config.texts.train), ("heldout", config.texts.heldout)):
        for text in sources:
            paths = expand_patterns([text.path])
            lines += _describe_texts(f"texts {part} {text.path}", paths, config.prepared_dir, max_examined)
    return "\n".join(lines)


def spread(length: int, count: int) -> list[int]:
    """Up to `count` indices of a sequence, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(np.int64)).tolist()


def _add(statistics: SourceStatistics, numbers: dict[str, int]) -> None:
    for name, number in numbers.items():
        statistics.numbers.setdefault(name, []).append(number)


def _reason(message: str) -> str:
    """The message without what differs from record to record: numbers and addresses, but not the 8 of UTF-8."""
    return re.sub(r"0x[0-9a-f]+|(?<![-\w])\d+", "N", message)[:_REASON_LENGTH]


def _describe_texts(name: str, paths: list[str], prepared_dir: str | None, max_examined: int) -> Iterator[str]:
    num_bytes = sum(os.path.getsize(path) for path in paths)
    yield f"{name}: {len(paths):,} files of {num_bytes:,} bytes"
    if prepared_dir is not None:
        num_tokens = sum(count_tokens(texts_folder(prepared_dir), path) for path in paths)
        yield f"  {num_tokens:,} tokens prepared so far" if num_tokens else "  not prepared yet"
    each = -(-max_examined // len(paths))
    broken = BrokenLines(math.inf)
    paragraphs = [
        paragraph.text for path in paths for paragraph in islice(read_paragraphs(whole_file(path), broken), each)
    ]
    examined = len(paragraphs) + len(broken.lines)  # a broken line counts as a paragraph
    statistics = SourceStatistics(num_samples=0, num_examined=examined, skipped={})
    statistics.broken.update(_reason(re.sub(r"^.*?:\d+: ", "", line)) for line in broken.lines)
    for paragraph in paragraphs:
        _add(statistics, {"paragraph characters": len(paragraph), "paragraph words": len(paragraph.split())})
    yield f"  {examined:,} paragraphs examined"
    yield from (f"  {line}" for line in statistics.describe()[1:])
