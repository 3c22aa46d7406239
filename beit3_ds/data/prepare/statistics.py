"""Describes the data of a run: number of samples, image sizes, text lengths, example texts and broken records."""

import math
import os
import re
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from beit3_ds.config import DataConfig
from beit3_ds.data.files.patterns import expand_patterns
from beit3_ds.data.files.records import BrokenRecordError, Skipped
from beit3_ds.data.images.source import ImageSource
from beit3_ds.data.sources import open_images, spread
from beit3_ds.data.text.paragraphs import BrokenLines, read_paragraphs, whole_file
from beit3_ds.data.text.sequences import texts_folder
from beit3_ds.data.text.token_files import count_tokens
from beit3_ds.data.validation_overlap import check_validation_apart
from beit3_ds.printing import printable

_PERCENTILES = (0, 10, 50, 90, 100)
_MAX_NAMED = 10  # maximum number of broken records that a report names per reason
_NUM_TEXTS, _TEXT_LENGTH = 4, 100  # texts shown per source, and characters of each
_SUSPECTS = {
    "U+FFFD, which stands for what could not be decoded": re.compile("\ufffd"),
    "what looks like UTF-8 read as Latin-1": re.compile("[\u00c2-\u00c3\u00e2][\u0080-\u00bf\u20ac\u201a-\u201e]"),
}


@dataclass(kw_only=True)
class SourceStatistics:
    """Holds statistics about one data source."""

    num_samples: int
    """Number of samples in the source."""
    num_examined: int
    """Number of samples that were read for the statistics."""
    skipped: dict[str, Skipped]
    """Number of skipped files, tar members, rows and lines for each reason, with an example."""
    numbers: dict[str, list[int]] = field(default_factory=dict)
    """Measurements by name: image widths and heights in pixels, and numbers of characters and words per text."""
    texts: list[str] = field(default_factory=list)
    """All readable texts of the examined samples, in order."""
    broken: dict[str, list[str]] = field(default_factory=dict)
    """Messages about broken samples, grouped by reason. A sample can have two messages: for its image and for its
    caption."""
    num_broken: int = 0
    """Number of broken samples. A sample counts once even if its image and its caption are broken."""

    def describe(self) -> list[str]:
        """Returns a description of the source as lines of text; percentiles cover only readable samples."""
        lines = [f"{self.num_samples:,} samples, {self.num_examined:,} of them examined"]
        for name, numbers in self.numbers.items():
            values = np.percentile(numbers, _PERCENTILES).round().astype(int)
            named = ", ".join(f"{percentile}%: {value}" for percentile, value in zip(_PERCENTILES, values, strict=True))
            lines.append(f"{name}: {named}")
        lines += [f"text: {_show(self.texts[index])}" for index in spread(len(self.texts), _NUM_TEXTS)]
        lines += self._describe_suspects()
        for messages in sorted(self.broken.values(), key=len, reverse=True):
            lines.append(f"broken: {len(messages):,} of {self.num_examined:,}:")
            lines += [f"  {printable(message)}" for message in messages[:_MAX_NAMED]]
            lines += [f"  ... and {len(messages) - _MAX_NAMED:,} more of this kind"] * (len(messages) > _MAX_NAMED)
        for reason, found in self.skipped.items():
            lines.append(printable(f"left out: {found.num_members:,}: {reason} (such as {found.example})"))
        return lines

    def problems(self, max_broken_records: int) -> list[str]:
        """Returns the reasons why a run would fail on this source, one line each; may be empty.

        Args:
            max_broken_records: maximum number of broken samples that the run tolerates (`data.max_broken_records`).
        """
        if self.num_broken and self.num_broken == self.num_examined:
            return [f"none of {self.num_examined:,} examined samples can be read"]
        if self.num_broken > max_broken_records:
            return [
                f"{self.num_broken:,} of {self.num_examined:,} examined samples are broken, more than "
                f"data.max_broken_records={max_broken_records:,}"
            ]
        return []

    def add_broken(self, message: str) -> None:
        """Adds a message about a broken sample, grouped by the reason in the message."""
        self.broken.setdefault(_reason(message), []).append(message)

    def _describe_suspects(self) -> list[str]:
        lines = []
        for what, pattern in _SUSPECTS.items():
            found = [text for text in self.texts if pattern.search(text)]
            if found:
                share = f"{len(found):,} of {len(self.texts):,}"
                lines.append(f"suspicious: {share} texts hold {what}, such as {_show(found[0])}")
        return lines


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Describes a run's data files and their problems."""

    text: str
    """Description of all files, as text with one fact per line."""
    problems: list[str]
    """Reasons why a run on these files would fail, one line each."""


def open_sources(config: DataConfig) -> dict[str, ImageSource]:
    """Opens the image sources of a run, keyed by stream, split and path, such as `pairs train cc3m-*.tar`.

    Skips sources in a task's own format, because only the task can read them.

    Raises:
        ConfigError: if files are missing or cannot be read.
    """
    return {
        f"{name} {split} {source.path}": open_images(source, config.cache_dir)
        for name, stream in (("images", config.images), ("pairs", config.pairs))
        for split in ("train", "validation", "test")
        for source in getattr(stream, split)
        if not source.has_task_format
    }


def examine_source(source: ImageSource, with_captions: bool, max_examined: int) -> SourceStatistics:
    """Reads at most `max_examined` evenly spread samples of a source, and returns their statistics.

    Args:
        source: source of images.
        with_captions: whether to read captions too.
        max_examined: maximum number of samples to read.
    """
    indices = spread(len(source), max_examined)
    statistics = SourceStatistics(num_samples=len(source), num_examined=len(indices), skipped=source.skipped)
    for index in indices:
        messages = []
        try:
            width, height = source.image(index).size
            _add(statistics, {"image width": width, "image height": height})
        except BrokenRecordError as error:
            messages.append(str(error))
        if with_captions:
            try:
                caption = source.caption(index)
                statistics.texts.append(caption)
                _add(statistics, {"caption characters": len(caption), "caption words": len(caption.split())})
            except BrokenRecordError as error:
                messages.append(str(error))
        for message in messages:
            statistics.add_broken(message)
        statistics.num_broken += bool(messages)
    return statistics


def describe_streams(config: DataConfig, max_examined: int) -> DataReport:
    """Describes the training, validation and test files of a run, and their problems.

    Skips sources in a task's own format.

    Args:
        config: data section of the run's config.
        max_examined: maximum number of samples to read per source. The images are evenly spread over the source; the
            texts are the first paragraphs of each file.

    Raises:
        ConfigError: if files are missing or cannot be read, or validation files are also training files.
        StorageError: if the file system fails.
    """
    check_validation_apart(config)
    lines: list[str] = []
    problems: list[str] = []
    for name, source in open_sources(config).items():
        statistics = examine_source(source, name.startswith("pairs"), max_examined)
        lines += [f"{name}:", *(f"  {line}" for line in statistics.describe())]
        problems += [f"{name}: {problem}" for problem in statistics.problems(config.max_broken_records)]
    for split in ("train", "validation", "test"):
        for text in getattr(config.texts, split):
            if text.has_task_format:
                continue
            name, paths = f"texts {split} {text.path}", expand_patterns([text.path])
            num_bytes = sum(os.path.getsize(path) for path in paths)
            statistics = _examine_texts(paths, max_examined)
            lines.append(f"{name}: {len(paths):,} files of {num_bytes:,} bytes")
            lines += [f"  {line}" for line in _describe_tokens(paths, config.cache_dir)]
            lines.append(f"  {statistics.num_examined:,} paragraphs examined")
            lines += [f"  {line}" for line in statistics.describe()[1:]]
            problems += [f"{name}: {problem}" for problem in statistics.problems(config.max_broken_records)]
            if not statistics.num_examined:
                problems.append(f"{name}: no text")
    return DataReport(text="\n".join(lines), problems=problems)


def _add(statistics: SourceStatistics, numbers: dict[str, int]) -> None:
    for name, number in numbers.items():
        statistics.numbers.setdefault(name, []).append(number)


def _reason(message: str) -> str:
    """Extracts the reason from a message about a broken record, without record name, numbers and addresses."""
    _, _, reason = message.partition(": broken ")
    return re.sub(r"0x[0-9a-f]+|\d+", "", reason or re.sub(r"^.*?:\d+: |^.*: (?=no )", "", message))


def _show(text: str) -> str:
    """Returns the beginning of a text, with unprintable characters as escapes."""
    return repr(text[:_TEXT_LENGTH]) + ("..." if len(text) > _TEXT_LENGTH else "")


def _examine_texts(paths: list[str], max_examined: int) -> SourceStatistics:
    each = -(-max_examined // len(paths))
    statistics = SourceStatistics(num_samples=0, num_examined=0, skipped={})
    empty: list[str] = []
    for path in paths:
        broken = BrokenLines(math.inf)
        paragraphs = [paragraph.text for paragraph in islice(read_paragraphs(whole_file(path), broken), each)]
        empty += [path] * (not paragraphs)
        # A broken line counts as a paragraph.
        statistics.num_examined += len(paragraphs) + len(broken.lines)
        statistics.num_broken += len(broken.lines)
        statistics.texts += paragraphs
        for line in broken.lines:
            statistics.add_broken(line)
    for paragraph in statistics.texts:
        _add(statistics, {"paragraph characters": len(paragraph), "paragraph words": len(paragraph.split())})
    if empty:
        statistics.skipped["file without text"] = Skipped(len(empty), empty[0])
    return statistics


def _describe_tokens(paths: list[str], cache_dir: str | None) -> list[str]:
    if cache_dir is None:
        return []
    num_tokens = count_tokens(texts_folder(cache_dir), paths)
    return [f"{num_tokens:,} tokens prepared so far" if num_tokens else "not prepared yet"]
