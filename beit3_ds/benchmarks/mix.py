"""Describes the shapes of a micro-batch of the paper's mix: sequence lengths and numbers of masked positions."""

from typing import NamedTuple

import numpy as np

from beit3_ds.benchmarks.step.batches import CAPTION_TOKENS, TEXT_TOKENS, draw_length
from beit3_ds.config.model import MODEL_SIZES
from beit3_ds.kernels.ops.attention_plan import Ranges


class Mix(NamedTuple):
    """Lists the sequence lengths of a micro-batch with equal numbers of images, pairs and texts, in packed order."""

    samples: int
    """Number of images, which is also the number of pairs and of texts."""
    image_length: int
    """Number of rows per image."""
    caption_lengths: tuple[int, ...]
    """Number of rows of every caption."""
    text_lengths: tuple[int, ...]
    """Number of rows of every text."""

    @property
    def boundaries(self) -> tuple[int, int, int, int]:
        """Returns four row numbers, at which the images, the pairs' images, the captions and the texts end."""
        a = self.samples * self.image_length
        c = 2 * a + sum(self.caption_lengths)
        return a, 2 * a, c, c + sum(self.text_lengths)

    @property
    def num_rows(self) -> int:
        """Returns the number of packed rows, T."""
        return self.boundaries[3]

    @property
    def ranges(self) -> Ranges:
        """Returns the row ranges of every sequence: one for an image or a text, two for a pair."""
        _, b, c, _ = self.boundaries
        images = [(i * self.image_length, (i + 1) * self.image_length) for i in range(2 * self.samples)]
        captions, texts = _consecutive(b, self.caption_lengths), _consecutive(c, self.text_lengths)
        pairs = zip(images[self.samples :], captions, strict=True)
        return tuple([(image,) for image in images[: self.samples]] + list(pairs) + [(text,) for text in texts])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Returns the number of rows of every sequence."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.ranges)

    @property
    def num_masked_tokens(self) -> int:
        """Returns the number of masked tokens: 15% of the texts' and half of the captions' (paper, section 2.2)."""
        return round(0.15 * sum(self.text_lengths) + 0.5 * sum(self.caption_lengths))

    def describe(self) -> str:
        """Returns the numbers of samples and rows as text for a table, e.g. "4+4+4 T=2106"."""
        return f"{self.samples}+{self.samples}+{self.samples} T={self.num_rows}"


def draw_mix(size: str, samples: int, seed: int = 0) -> Mix:
    """Returns a mix of images at 224 px with captions and texts of the lengths that `step.batches` draws.

    Args:
        size: a name in MODEL_SIZES.
        samples: number of images, of pairs and of texts.
        seed: seed of the lengths.
    """
    rng = np.random.default_rng(seed)
    laws = (CAPTION_TOKENS, 64), (TEXT_TOKENS, 128)  # a run's default limits
    captions, texts = (tuple(draw_length(rng, law, longest) for _ in range(samples)) for law, longest in laws)
    patches = (224 // MODEL_SIZES[size]["patch_size"]) ** 2
    return Mix(samples, 1 + patches, captions, texts)


def _consecutive(start: int, lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    stops = [start + int(total) for total in np.cumsum(lengths)]
    return [(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
