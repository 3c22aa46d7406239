"""Maps the rows of a packed stream to experts and sequences.

A stream is ordered by modality and has no padding:

    [ images | images of pairs | texts of pairs | texts ]
      0      a                 b                c       T

The letters are the rows at which the four ranges stop; T is the number of rows.
"""

# T rows; I images without texts, P pairs, X texts without images; Q = I + P + X sequences, numbered in this order.

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.patch_grids import Grids, window_ranges


class Part(NamedTuple):
    """Describes one of the four consecutive row ranges of a packed stream, e.g. the images of pairs."""

    modality: str
    """Modality of the rows, "vision" or "language", which is also the name of the modality's expert."""
    fused_expert: str | None
    """Expert that computes these rows in layers with a fused expert: "vision_language" for the rows of pairs. None for
    rows of images and texts alone, which the expert of their modality computes in every layer."""


PARTS = (
    Part("vision", None),
    Part("vision", "vision_language"),
    Part("language", "vision_language"),
    Part("language", None),
)
"""The four row ranges of a packed stream, in row order: images, images of pairs, texts of pairs, texts.

A third modality with its own fused expert can be added at the end, as (language, fused), (modality, fused),
(modality, None). Then the rows of every expert are still consecutive."""


class RowLayout(ABC):
    """Declares the number of rows in each of the four row ranges of a stream, and derives the rows of each expert."""

    @property
    @abstractmethod
    def part_rows(self) -> tuple[int, ...]:
        """Returns the number of rows in each of the four row ranges in `PARTS`."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Returns the row at which each of the four row ranges in `PARTS` stops; the last is the number of rows."""
        return tuple(accumulate(self.part_rows))

    @property
    def num_rows(self) -> int:
        """Returns the number of rows of the stream, T."""
        return sum(self.part_rows)

    def expert_slices(self, experts: tuple[str, ...]) -> list[tuple[int, int]]:
        """Returns the row range [start, stop) of each expert, in row order; an expert without rows gets an empty range.

        The rows of each entry of `PARTS` belong to its fused expert if the layer has that expert, otherwise to the
        expert of its modality. A layer lacks both experts if no input of the model needs them (`ModelConfig.inputs`);
        then the stream must have no such rows.

        Args:
            experts: names of the layer's experts in the order of their rows. Examples are ("shared",), which takes all
                rows, ("vision", "language"), and ("vision", "vision_language", "language").
        """
        if experts not in self._known_slices:  # every layer asks several times
            self._known_slices[experts] = self._find_slices(experts)
        return self._known_slices[experts]

    @cached_property
    def _known_slices(self) -> dict[tuple[str, ...], list[tuple[int, int]]]:
        return {}

    def _find_slices(self, experts: tuple[str, ...]) -> list[tuple[int, int]]:
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
    """Describes rows that are picked one by one from a stream, such as those that a task's head reads."""

    rows: Tensor
    """Indices of the picked rows in the stream, ascending, int64."""
    counts: tuple[int, ...]
    """Number of picked rows in each of the four row ranges in `PARTS`."""

    @property
    def part_rows(self) -> tuple[int, ...]:
        """Returns the number of picked rows in each of the four row ranges in `PARTS`."""
        return self.counts


@dataclass(frozen=True)
class SequenceLayout(RowLayout):
    """Describes a stream that consists of complete images, pairs and texts."""

    num_images: int
    """Number of images without captions, I."""
    caption_lengths: tuple[int, ...]
    """Number of tokens of each pair's caption."""
    text_lengths: tuple[int, ...]
    """Number of tokens of each text without an image."""
    image_length: int
    """Number of rows per image."""
    causal_captions: bool = False
    """Whether attention in pairs is masked for captioning. Then image rows see their image, and caption rows see their
    image and the caption up to themselves. Texts without images are never masked."""
    image_grids: Grids = ()
    """Patches per column and per row of each image, for images of any size without CLS rows (`patch_grids`). If it is
    not empty, there are no pairs and texts, and `image_length` has no effect."""

    @property
    def part_rows(self) -> tuple[int, ...]:
        """Returns the number of rows in each of the four row ranges in `PARTS`."""
        if self.image_grids:
            return (sum(height * width for height, width in self.image_grids), 0, 0, 0)
        return (
            self.num_images * self.image_length,
            len(self.caption_lengths) * self.image_length,
            sum(self.caption_lengths),
            sum(self.text_lengths),
        )

    def attention_ranges(self, window_size: int) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Returns the row ranges in which a layer attends: those of the sequences, or of the windows of each image.

        Args:
            window_size: patches on a side of the layer's windows; 0 returns `sequence_ranges`.
        """
        return window_ranges(self.image_grids, window_size) if window_size else self.sequence_ranges

    @cached_property
    def sequence_ranges(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Returns the row ranges [start, stop) of each sequence: one, or two for a pair (image, then caption)."""
        if self.image_grids:
            return window_ranges(self.image_grids, 0)
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
        """Returns the first row of every image or text in some of the row ranges: CLS of images, BOS of texts.

        Args:
            parts: indices of these row ranges in `PARTS`, ascending.
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
        """Returns the sequences to keep as a smaller stream; they stay in their order.

        Args:
            kept: whether to keep each sequence, one value per sequence.
        """
        pairs = self.num_images + len(self.caption_lengths)
        layout = SequenceLayout(
            sum(kept[: self.num_images]),
            tuple(length for length, keep in zip(self.caption_lengths, kept[self.num_images :], strict=False) if keep),
            tuple(length for length, keep in zip(self.text_lengths, kept[pairs:], strict=True) if keep),
            self.image_length,
            self.causal_captions,
            tuple(grid for grid, keep in zip(self.image_grids, kept, strict=False) if keep),
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
    """Describes the sequences of a stream that stochastic depth keeps, as a smaller stream."""

    rows: Tensor
    """Indices in the whole stream of the rows of kept sequences, ascending, int64, in host memory."""
    layout: SequenceLayout
    """Layout of the smaller stream, which consists of these rows."""
