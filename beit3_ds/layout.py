"""Maps the rows of a packed stream to experts and sequences.

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
    """Describes a part of the packed stream: all rows of one modality that belong to pairs, or that do not."""

    modality: str
    """Modality, which is also the name of its expert."""
    fused_expert: str | None
    """Expert of the rows in layers that have it; None for samples that are not paired."""


PARTS = (
    Part("vision", None),
    Part("vision", "vision_language"),
    Part("language", "vision_language"),
    Part("language", None),
)
"""All parts, in row order.

Language is in the middle. A further modality with its own fused expert can be added before or after the others as
(language, fused), (modality, fused), (modality, None). Every expert still owns one slice then."""


class RowLayout(ABC):
    """Holds the number of rows of each part of a stream, from which the rows of each expert follow."""

    @property
    @abstractmethod
    def part_rows(self) -> tuple[int, ...]:
        """Returns the number of rows in each of `PARTS`."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Returns the end row of each of `PARTS`: (a, b, c, T) in the module's docstring."""
        return tuple(accumulate(self.part_rows))

    @property
    def num_rows(self) -> int:
        """Returns the number of rows, T."""
        return sum(self.part_rows)

    def expert_slices(self, experts: tuple[str, ...]) -> list[tuple[int, int]]:
        """Returns the rows [start, stop) of each expert, in row order; an expert without rows has an empty slice.

        A part of the stream belongs to its fused expert if that exists, otherwise to the expert of its modality. An
        expert that no input of the model needs may be absent, and then its parts must have no rows
        (`ModelConfig.inputs`).

        Args:
            experts: names of the existing experts in the order of their rows: ("shared",) for one that takes all rows,
                or experts of modalities and, in layers that have them, fused experts between them.
        """
        if experts == ("shared",):
            return [(0, self.num_rows)]
        owners = [part.fused_expert if part.fused_expert in experts else part.modality for part in PARTS]
        order = list(dict.fromkeys(owner for owner in owners if owner in experts))
        assert order == list(experts), f"experts {experts} are not in the order of the rows, {order}"
        rows = dict.fromkeys(experts, 0)
        for part, owner, count in zip(PARTS, owners, self.part_rows, strict=True):
            assert owner in rows or not count, f"{count} rows of {part} need the expert {owner}; there are {experts}"
            if owner in rows:
                rows[owner] += count
        stops = list(accumulate(rows.values()))
        assert stops[-1] == self.num_rows, f"experts {experts} compute {stops[-1]} of {self.num_rows} rows"
        return list(zip([0, *stops[:-1]], stops, strict=True))


@dataclass(frozen=True)
class PickedRows(RowLayout):
    """Describes single rows picked from a stream, in ascending order."""

    rows: Tensor
    """Indices of the rows in the stream, ascending, int64."""
    counts: tuple[int, ...]
    """Number of picked rows in each of `PARTS`."""

    @property
    def part_rows(self) -> tuple[int, ...]:
        """Returns the number of picked rows in each of `PARTS`."""
        return self.counts


@dataclass(frozen=True)
class SequenceLayout(RowLayout):
    """Describes a stream of whole sequences."""

    num_images: int
    """Number of images without captions, I."""
    caption_lengths: tuple[int, ...]
    """Tokens of each caption; P values."""
    text_lengths: tuple[int, ...]
    """Tokens of each text; X values."""
    image_length: int
    """Number of rows per image."""
    causal_captions: bool = False
    """Whether attention in pairs is masked for captioning: image rows see their image, caption rows their image and the
    caption up to themselves. Texts without images are never masked."""

    @property
    def part_rows(self) -> tuple[int, ...]:
        """Returns the number of rows in each of `PARTS`."""
        return (
            self.num_images * self.image_length,
            len(self.caption_lengths) * self.image_length,
            sum(self.caption_lengths),
            sum(self.text_lengths),
        )

    @cached_property
    def sequence_ranges(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Returns the row ranges [start, stop) of each sequence: one, or two for a pair (image, then caption)."""
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

    def first_rows(self, *parts: int) -> PickedRows:
        """Returns the first row of every image or text in the given parts: CLS of images, BOS of texts.

        Args:
            parts: indices of `PARTS`, ascending.
        """
        image = (self.image_length,)
        lengths = (image * self.num_images, image * len(self.caption_lengths), self.caption_lengths, self.text_lengths)
        rows: list[int] = []
        for part in parts:
            stop = self.boundaries[part]
            rows += [stop - rest for rest in reversed(list(accumulate(reversed(lengths[part]))))]
        counts = tuple(len(lengths[part]) if part in parts else 0 for part in range(len(PARTS)))
        return PickedRows(torch.tensor(rows, dtype=torch.int64), counts)

    def keep(self, kept: Sequence[bool]) -> "KeptSequences":
        """Returns the stream of the kept sequences, in their order.

        Args:
            kept: whether to keep a sequence, for each of the Q sequences.
        """
        pairs = self.num_images + len(self.caption_lengths)
        layout = SequenceLayout(
            sum(kept[: self.num_images]),
            tuple(length for length, keep in zip(self.caption_lengths, kept[self.num_images :], strict=False) if keep),
            tuple(length for length, keep in zip(self.text_lengths, kept[pairs:], strict=True) if keep),
            self.image_length,
            self.causal_captions,
        )
        ranges = [sequence for sequence, keep in zip(self.sequence_ranges, kept, strict=True) if keep]
        # Row order: images, images of pairs, captions, texts.
        images, pairs = layout.num_images, layout.num_images + len(layout.caption_lengths)
        parts = [sequence[0] for sequence in ranges[:pairs]]
        parts += [sequence[1] for sequence in ranges[images:pairs]] + [sequence[0] for sequence in ranges[pairs:]]
        rows = [torch.arange(start, stop) for start, stop in parts]
        return KeptSequences(torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64), layout)


@dataclass(frozen=True)
class KeptSequences:
    """Describes some sequences of a stream as a stream of their own."""

    rows: Tensor
    """Indices of their rows in the whole stream, ascending, int64, in host memory."""
    layout: SequenceLayout
    """Layout of the stream of these rows."""
