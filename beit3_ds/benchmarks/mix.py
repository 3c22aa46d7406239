"""A micro-batch of the paper's mix, as shapes: what lengths its sequences have, and how many positions are masked."""

from typing import NamedTuple

import numpy as np

from beit3_ds.benchmarks.step.batches import CAPTION_TOKENS, TEXT_TOKENS, draw_length
from beit3_ds.config.model import MODEL_SIZES
from beit3_ds.kernels.ops.attention_plan import Ranges


class Mix(NamedTuple):
    """Images, pairs and texts, as many of each, in the packed order."""

    samples: int
    """Of each stream."""
    image_length: int
    """Rows of an image."""
    caption_lengths: tuple[int, ...]
    """Rows of every caption."""
    text_lengths: tuple[int, ...]
    """Rows of every text."""

    @property
    def boundaries(self) -> tuple[int, int, int, int]:
        """End of the images, of the pairs' images, of the captions, of the texts."""
        a = self.samples * self.image_length
        c = 2 * a + sum(self.caption_lengths)
        return a, 2 * a, c, c + sum(self.text_lengths)

    @property
    def num_rows(self) -> int:
        """T."""
        return self.boundaries[3]

    @property
    def ranges(self) -> Ranges:
        """The row ranges of every sequence."""
        _, b, c, _ = self.boundaries
        images = [(i * self.image_length, (i + 1) * self.image_length) for i in range(2 * self.samples)]
        captions, texts = _consecutive(b, self.caption_lengths), _consecutive(c, self.text_lengths)
        pairs = zip(images[self.samples :], captions, strict=True)
        return tuple([(image,) for image in images[: self.samples]] + list(pairs) + [(text,) for text in texts])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of every sequence."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.ranges)

    @property
    def num_masked_tokens(self) -> int:
        """15% of the texts' tokens and half of the captions' (paper section 2.2)."""
        return round(0.15 * sum(self.text_lengths) + 0.5 * sum(self.caption_lengths))

    def describe(self) -> str:
        """Samples and rows."""
        return f"{self.samples}+{self.samples}+{self.samples} T={self.num_rows}"


def draw_mix(size: str, samples: int, seed: int = 0) -> Mix:
    """Images at 224 px, captions and texts of the lengths that `train_batches` draws.

    Args:
        size: a name in MODEL_SIZES.
        samples: of each stream.
        seed: of the lengths.
    """
    rng = np.random.default_rng(seed)
    laws = (CAPTION_TOKENS, 64), (TEXT_TOKENS, 128)  # the longest are the defaults of a run
    captions, texts = (tuple(draw_length(rng, law, longest) for _ in range(samples)) for law, longest in laws)
    patches = (224 // MODEL_SIZES[size]["patch_size"]) ** 2
    return Mix(samples, 1 + patches, captions, texts)


def _consecutive(start: int, lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    stops = [start + int(total) for total in np.cumsum(lengths)]
    return [(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
