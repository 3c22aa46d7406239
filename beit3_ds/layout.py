"""Which rows of a packed stream belong to which expert and to which sequence.

A stream is modality-major and has no padding:

    [ images | images of pairs | texts of pairs | texts ]
      0      a                 b                c       T
"""

# T rows; I images, P pairs, X texts, Q = I + P + X sequences, numbered in this order.

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """A part of every packed stream: rows of one modality, of samples with or without a partner."""

    modality: str
    """The modality, which names the expert of its rows."""
    fused_expert: str | None
    """The expert that takes the rows in layers that have it; None for samples without a partner."""


PARTS = (
    Part("vision", None),
    Part("vision", "vision_language"),
    Part("language", "vision_language"),
    Part("language", None),
)
"""The parts in the order of their rows. Language is in the middle, so that a further modality, with its own fused
expert, is appended as (language, fused), (modality, fused), (modality, None) before or after the others and every
expert still owns one slice."""


class RowLayout(ABC):
    """The parts of a stream, or of rows picked from one in their order, and so the experts' rows."""

    @property
    @abstractmethod
    def part_rows(self) -> tuple[int, ...]:
        """Rows of each of `PARTS`."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The row at which each of `PARTS` ends: (a, b, c, T) of the module's picture."""
        return tuple(accumulate(self.part_rows))

    @property
    def num_rows(self) -> int:
        """Rows, T."""
        return sum(self.part_rows)

    def expert_slices(self, experts: tuple[str, ...]) -> list[tuple[int, int]]:
        """Returns the rows [start, stop) of each expert, in row order; an expert without rows has an empty slice.

        Args:
            experts: names of the experts in the order of their rows: ("shared",) for one that takes all rows, or one
                expert per modality and, in layers that have them, fused experts between them.
        """
        if experts == ("shared",):
            return [(0, self.num_rows)]
        owners = [part.fused_expert if part.fused_expert in experts else part.modality for part in PARTS]
        assert list(dict.fromkeys(owners)) == list(experts), f"experts {experts} do not own the parts {PARTS}"
        rows = dict.fromkeys(experts, 0)
        for owner, count in zip(owners, self.part_rows, strict=True):
            rows[owner] += count
        stops = list(accumulate(rows.values()))
        return list(zip([0, *stops[:-1]], stops, strict=True))


@dataclass(frozen=True)
class PickedRows(RowLayout):
    """Single rows of a stream."""

    rows: Tensor
    """Their numbers in the stream, ascending, int64."""
    counts: tuple[int, ...]
    """How many of them are in each of `PARTS`."""

    @property
    def part_rows(self) -> tuple[int, ...]:
        """Rows of each of `PARTS`."""
        return self.counts


@dataclass(frozen=True)
class SequenceLayout(RowLayout):
    """A stream of whole sequences."""

    num_images: int
    """Images without texts, I."""
    caption_lengths: tuple[int, ...]
    """Tokens of each caption; P values."""
    text_lengths: tuple[int, ...]
    """Tokens of each text; X values."""
    image_length: int
    """Rows of one image."""

    @property
    def part_rows(self) -> tuple[int, ...]:
        """Rows of each of `PARTS`."""
        return (
            self.num_images * self.image_length,
            len(self.caption_lengths) * self.image_length,
            sum(self.caption_lengths),
            sum(self.text_lengths),
        )

    @cached_property
    def sequence_ranges(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Row ranges [start, stop) of each sequence: one, or two for a pair (image, then caption)."""
        a, b, _, _ = self.boundaries
        length = self.image_length
        ranges: list[tuple[tuple[int, int], ...]] = [((i * length, (i + 1) * length),) for i in range(self.num_images)]
        row = b
        for i, caption_length in enumerate(self.caption_lengths):
            ranges.append(((a + i * length, a + (i + 1) * length), (row, row + caption_length)))
            row += caption_length
        for text_length in self.text_lengths:
            ranges.append(((row, row + text_length),))
            row += text_length
        return tuple(ranges)

    def keep(self, kept: Sequence[bool]) -> "KeptSequences":
        """A stream of some of the sequences, in their order.

        Args:
            kept: whether to keep each of the Q sequences.
        """
        pairs = self.num_images + len(self.caption_lengths)
        layout = SequenceLayout(
            sum(kept[: self.num_images]),
            tuple(length for length, keep in zip(self.caption_lengths, kept[self.num_images :], strict=False) if keep),
            tuple(length for length, keep in zip(self.text_lengths, kept[pairs:], strict=True) if keep),
            self.image_length,
        )
        ranges = [sequence for sequence, keep in zip(self.sequence_ranges, kept, strict=True) if keep]
        # First parts of all, which for pairs are images, then captions; those of texts come after captions.
        images, pairs = layout.num_images, layout.num_images + len(layout.caption_lengths)
        parts = [sequence[0] for sequence in ranges[:pairs]]
        parts += [sequence[1] for sequence in ranges[images:pairs]] + [sequence[0] for sequence in ranges[pairs:]]
        rows = [torch.arange(start, stop) for start, stop in parts]
        return KeptSequences(torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64), layout)


@dataclass(frozen=True)
class KeptSequences:
    """Some sequences of a stream, which make a stream of their own."""

    rows: Tensor
    """The numbers of their rows in the whole stream, ascending, int64, in host memory."""
    layout: SequenceLayout
    """Of the stream that these rows make."""
