"""Converts images and texts from users to model inputs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from beit3_ds.config import ConfigError, ModelConfig
from beit3_ds.preprocess import preprocess
from beit3_ds.tokenizers import TextTokenizer

ImageInput = str | Path | bytes | Image.Image | Tensor
"""An image: the path or the bytes of an image file, a Pillow image, or prepared pixels, (3, size, size) in [-1, 1]."""


@dataclass(frozen=True)
class ImageProcessor:
    """Prepares images for a model."""

    image_size: int
    """Side of the prepared images in pixels."""
    crop: bool
    """True crops each image to its largest centred square; False squeezes the whole image into a square."""
    device: torch.device
    """Device of the prepared images."""

    def __call__(self, images: Sequence[ImageInput]) -> Tensor:
        """Returns the pixels of images, (images, 3, image_size, image_size) float32.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if an image is broken.
        """
        pixels = [
            image if isinstance(image, Tensor) else preprocess(image, self.image_size, crop=self.crop)
            for image in images
        ]
        empty = torch.empty(0, 3, self.image_size, self.image_size)
        return (torch.stack(pixels) if pixels else empty).to(self.device)


@dataclass(frozen=True)
class TextProcessor:
    """Converts texts to token ids for a model."""

    tokenizer: TextTokenizer
    """Tokenizer that was used to train the model."""
    max_length: int
    """Maximum tokens per text, including BOS and EOS; longer texts are truncated."""

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text, including BOS and EOS.

        Raises:
            ConfigError: if `texts` is a single string, or a text is empty.
        """
        if isinstance(texts, str):
            raise ConfigError(f"{texts[:40]!r} is one text; give a list of texts.")
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)[: self.max_length - 2]
        if not ids:
            raise ConfigError(f"the text {text!r} holds nothing that the tokenizer keeps. Give it words.")
        return [self.tokenizer.bos_id, *ids, self.tokenizer.eos_id]


def build_text_processor(tokenizer: TextTokenizer | str | Path, config: ModelConfig) -> TextProcessor:
    """Builds the processor that converts texts to token ids for a model.

    Args:
        tokenizer: tokenizer that was used to train the model, or the path of its SentencePiece file.
        config: config of the model.

    Raises:
        ConfigError: if the tokenizer cannot be read, or has more ids than the model.
    """
    tokenizer = tokenizer if isinstance(tokenizer, TextTokenizer) else TextTokenizer(tokenizer)
    if tokenizer.vocab_size > config.text_vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model has {config.text_vocab_size}. Use the "
            "tokenizer that the model was trained with."
        )
    return TextProcessor(tokenizer, config.max_text_length)


def as_images(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """Returns the images as a list; a single image becomes a list of one image."""
    if isinstance(images, str | bytes | Path | Image.Image) or (isinstance(images, Tensor) and images.dim() == 3):
        return [images]
    return list(images)


def as_texts(texts: str | Sequence[str]) -> list[str]:
    """Returns the texts as a list; a single text becomes a list of one text."""
    return [texts] if isinstance(texts, str) else list(texts)


def in_batches(count: int, batch_size: int) -> Iterator[slice]:
    """Yields the slices that divide `count` items into consecutive batches.

    Raises:
        ConfigError: if `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is not positive.")
    return (slice(start, start + batch_size) for start in range(0, count, batch_size))
