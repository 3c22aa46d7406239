"""Describes a micro-batch of images, pairs and texts: the sequence lengths, and the number of masked tokens."""

from typing import NamedTuple

import numpy as np

from beit3_ds.benchmarks.step.batches import CAPTION_TOKENS, TEXT_TOKENS, draw_length
from beit3_ds.config.model import MODEL_SIZES
from beit3_ds.kernels.ops.attention_plan import Ranges


class Mix(NamedTuple):
    """Holds the sequence lengths of a micro-batch with equal numbers of images, image-text pairs and texts.

    The packed order is: images, images of the pairs, captions of the pairs, texts.
    """

    samples: int
    """Number of images, equal to the number of pairs and to the number of texts."""
    image_length: int
    """Rows per image."""
    caption_lengths: tuple[int, ...]
    """Rows of each caption."""
    text_lengths: tuple[int, ...]
    """Rows of each text."""

    @property
    def boundaries(self) -> tuple[int, int, int, int]:
        """Returns the rows at which images, pairs' images, captions and texts end, in this order."""
        a = self.samples * self.image_length
        c = 2 * a + sum(self.caption_lengths)
        return a, 2 * a, c, c + sum(self.text_lengths)

    @property
    def num_rows(self) -> int:
        """Returns the number of packed rows T."""
        return self.boundaries[3]

    @property
    def ranges(self) -> Ranges:
        """Returns the row ranges of each sequence: one range for an image or a text, two ranges for a pair."""
        _, b, c, _ = self.boundaries
        images = [(i * self.image_length, (i + 1) * self.image_length) for i in range(2 * self.samples)]
        captions, texts = _consecutive(b, self.caption_lengths), _consecutive(c, self.text_lengths)
        pairs = zip(images[self.samples :], captions, strict=True)
        return tuple([(image,) for image in images[: self.samples]] + list(pairs) + [(text,) for text in texts])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Returns the number of rows of each sequence."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.ranges)

    @property
    def num_masked_tokens(self) -> int:
        """Returns the number of masked tokens: 15% of text tokens plus 50% of caption tokens (paper, sec. 2.2)."""
        return round(0.15 * sum(self.text_lengths) + 0.5 * sum(self.caption_lengths))

    def describe(self) -> str:
        """Returns a table entry with the numbers of images, pairs, texts and rows, for example "4+4+4 T=2106"."""
        return f"{self.samples}+{self.samples}+{self.samples} T={self.num_rows}"


def draw_mix(size: str, samples: int, seed: int = 0) -> Mix:
    """Draws a micro-batch of images, image-text pairs and texts. Images have 224 px; captions and texts have random
    lengths.

    The lengths have the distributions in `step.batches`.

    Args:
        size: model size, a key of MODEL_SIZES.
        samples: number of images. There are as many pairs, and as many texts.
        seed: seed for the random lengths.
    """
    rng = np.random.default_rng(seed)
    laws = (CAPTION_TOKENS, 64), (TEXT_TOKENS, 128)  # 64 and 128 tokens are a run's default limits
    captions, texts = (tuple(draw_length(rng, law, longest) for _ in range(samples)) for law, longest in laws)
    patches = (224 // MODEL_SIZES[size]["patch_size"]) ** 2
    return Mix(samples, 1 + patches, captions, texts)


def _consecutive(start: int, lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    stops = [start + int(total) for total in np.cumsum(lengths)]
    return [(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
