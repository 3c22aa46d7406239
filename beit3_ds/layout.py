"""Maps the rows of a packed micro-batch to experts and sequences.

Rows are ordered by modality, without padding:

    [ images | images of pairs | texts of pairs | texts ]
      0      a                 b                c       T

Each letter is the row at which a range stops. T is the number of rows.
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
    """Describes one of the four consecutive row ranges of a micro-batch, such as the images of pairs."""

    modality: str
    """Modality of the rows, "vision" or "language". The modality's expert has the same name."""
    fused_expert: str | None
    """Expert for these rows in layers with a vision-language expert: "vision_language" for rows of pairs. None for
    other rows, which use their modality's expert in all layers."""


PARTS = (
    Part("vision", None),
    Part("vision", "vision_language"),
    Part("language", "vision_language"),
    Part("language", None),
)
"""The four row ranges of a packed micro-batch, in row order: images, images of pairs, texts of pairs, texts.

A third modality, such as audio, could be appended as three ranges: texts of audio pairs, audio of pairs, audio without
text. The rows of each expert would then still be consecutive.
"""


class RowLayout(ABC):
    """Base class that computes which rows of a packed micro-batch belong to each expert.

    Subclasses define `part_rows`: the number of rows in each of the four row ranges (`PARTS`).
    """

    @property
    @abstractmethod
    def part_rows(self) -> tuple[int, ...]:
        """Returns the number of rows in each of the four row ranges (`PARTS`)."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Returns the row at which each of the four row ranges (`PARTS`) stops; the last is the number of rows."""
        return tuple(accumulate(self.part_rows))

    @cached_property
    def num_rows(self) -> int:
        """Returns the number of rows (T)."""
        return sum(self.part_rows)

    def expert_slices(self, experts: tuple[str, ...]) -> list[tuple[int, int]]:
        """Returns the row range [start, stop) of each expert, in row order. Ranges may be empty.

        If the layer has the expert "shared", all rows belong to this expert. In other layers, rows of pairs belong to
        the "vision_language" expert if the layer has this expert. The remaining rows belong to the expert of their
        modality, which the layer must then have.

        Args:
            experts: names of the layer's experts, in row order. Examples: ("shared",); ("vision", "language");
                ("vision", "vision_language", "language").
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
    """Describes rows that are selected from a micro-batch one by one, such as those that a task's head reads."""

    rows: Tensor
    """Indices of the selected rows in the micro-batch, ascending, int64."""
    counts: tuple[int, ...]
    """Number of selected rows in each of the four row ranges (`PARTS`)."""

    @property
    def part_rows(self) -> tuple[int, ...]:
        """Returns the number of selected rows in each of the four row ranges (`PARTS`)."""
        return self.counts


@dataclass(frozen=True)
class SequenceLayout(RowLayout):
    """Describes the rows of a micro-batch that consists of complete images, pairs and texts."""

    num_images: int
    """Number of images without text (I)."""
    caption_lengths: tuple[int, ...]
    """Number of tokens of each pair's caption."""
    text_lengths: tuple[int, ...]
    """Number of tokens of each text without image."""
    image_length: int
    """Number of rows per image."""
    causal_captions: bool = False
    """Whether attention in pairs is masked for captioning. Image rows then attend only to the image. Caption rows
    attend to the image, to earlier caption rows and to themselves. Texts without image are never masked."""
    image_grids: Grids = ()
    """Numbers of patch rows and patch columns of each image, for models that take images of any size (`patch_grids`).
    These images have no CLS row. If not empty, there are no pairs and texts, and `image_length` is ignored."""

    @property
    def part_rows(self) -> tuple[int, ...]:
        """Returns the number of rows in each of the four row ranges (`PARTS`)."""
        if self.image_grids:
            return (sum(height * width for height, width in self.image_grids), 0, 0, 0)
        return (
            self.num_images * self.image_length,
            len(self.caption_lengths) * self.image_length,
            sum(self.caption_lengths),
            sum(self.text_lengths),
        )

    def attention_ranges(self, window_size: int) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Returns the row ranges within which a layer attends: those of each sequence, or of each window if the layer
        has windows.

        Args:
            window_size: side of the layer's windows in patches. A positive side requires `image_grids`; 0 returns
                `sequence_ranges`.
        """
        return window_ranges(self.image_grids, window_size) if window_size else self.sequence_ranges

    @cached_property
    def sequence_ranges(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Returns the row ranges [start, stop) of each sequence: one range, or two for a pair (image, caption)."""
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
        """Returns the first row of each image (CLS) or text (BOS) in the given row ranges.

        Args:
            parts: indices of the row ranges in `PARTS`, ascending.
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
        """Returns the layout and the rows of the sequences that are kept. Their order does not change.

        Args:
            kept: whether to keep each sequence.
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
    """Describes the sequences that stochastic depth keeps, as a smaller layout."""

    rows: Tensor
    """Rows of the kept sequences, as ascending indices into the micro-batch, int64, in host memory."""
    layout: SequenceLayout
    """Layout of the kept sequences' rows."""
