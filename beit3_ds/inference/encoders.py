"""Encodes images, texts and image-text pairs into features.

The classes are the vision encoder, the language encoder and the fusion encoder of the paper's figure 3. The module
`dual_encoder` contains the dual encoder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self, Unpack

import torch
from torch import Tensor

from beit3_ds.config import ConfigError
from beit3_ds.inference.inputs import (
    ImageInput,
    ImageProcessor,
    TextProcessor,
    as_images,
    as_texts,
    build_text_processor,
    in_batches,
)
from beit3_ds.inference.loading import LoadOptions, load_backbone
from beit3_ds.model import BEiT3
from beit3_ds.tokenizers import TextTokenizer


class VisionEncoder:
    """Computes features of images, using only the vision experts.

    Attributes:
        model: model for images.
        images: prepares images for the model.
    """

    def __init__(self, model: BEiT3, *, crop: bool = True) -> None:
        """Wraps a model.

        Args:
            model: model that accepts images; must have all layers.
            crop: True crops each image to its largest centred square; False squeezes the whole image into a square.
        """
        self.model = model
        self.images = ImageProcessor(model.config.image_size, crop, next(model.parameters()).device)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, crop: bool = True, **options: Unpack[LoadOptions]) -> Self:
        """Loads a vision encoder; reads only the weights needed for images.

        Args:
            path: exported, imported or released weights, a checkpoint, or a run's output folder.
            crop: True crops each image to its largest centred square; False squeezes the whole image into a square.
            options: `device`, `dtype` and `image_size` (`LoadOptions`).

        Raises:
            ConfigError: if the weights cannot be read, or have no vision experts.
        """
        return cls(load_backbone(path, ("images",), **options), crop=crop)

    @torch.no_grad()
    def __call__(self, images: ImageInput | Sequence[ImageInput], *, batch_size: int = 32) -> Tensor:
        """Returns the features of images, (images, 1 + patches, hidden size): CLS, then the patches in row-major order.

        Args:
            images: one image or several.
            batch_size: number of images per batch.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if an image is broken.
        """
        images, config = as_images(images), self.model.config
        features = [torch.empty(0, 1 + config.num_patches, config.hidden_size, device=self.images.device)]
        for batch in in_batches(len(images), batch_size):
            features.append(self.model.encode(self.images(images[batch])).images)
        return torch.cat(features[1:] or features)


class LanguageEncoder:
    """Computes features of texts, using only the language experts.

    Attributes:
        model: model for texts.
        texts: converts texts to token ids.
    """

    def __init__(self, model: BEiT3, texts: TextProcessor) -> None:
        self.model, self.texts = model, texts

    @classmethod
    def from_pretrained(
        cls, path: str | Path, tokenizer: TextTokenizer | str | Path, **options: Unpack[LoadOptions]
    ) -> Self:
        """Loads a language encoder; reads only the weights needed for texts.

        Args:
            path: exported, imported or released weights, a checkpoint, or a run's output folder.
            tokenizer: text tokenizer of the weights, or the path of its SentencePiece file.
            options: `device`, `dtype` and `max_text_length` (`LoadOptions`).

        Raises:
            ConfigError: if the weights or the tokenizer cannot be read, or the weights have no language experts.
        """
        model = load_backbone(path, ("texts",), **options)
        return cls(model, build_text_processor(tokenizer, model.config))

    @torch.no_grad()
    def __call__(self, texts: str | Sequence[str], *, batch_size: int = 64) -> list[Tensor]:
        """Returns the features of each text, (tokens, hidden size). The first row, BOS, serves as the text's CLS.

        Args:
            texts: one text or several.
            batch_size: number of texts per batch.

        Raises:
            ConfigError: if a text is empty.
        """
        ids = self.texts(as_texts(texts))
        return [row for batch in in_batches(len(ids), batch_size) for row in self.model.encode(texts=ids[batch]).texts]


class PairFeatures(NamedTuple):
    """Joint features of images and texts."""

    images: Tensor
    """Features of the images, (pairs, 1 + patches, hidden size): CLS, then the patches in row-major order."""
    texts: tuple[Tensor, ...]
    """Features of each text, (tokens, hidden size); the first row is BOS."""


class FusionEncoder:
    """Computes joint features of image-text pairs; the image and the text of a pair attend to each other.

    Attributes:
        model: model for image-text pairs.
        images: prepares images for the model.
        texts: converts texts to token ids.
    """

    def __init__(self, model: BEiT3, texts: TextProcessor, *, crop: bool = True) -> None:
        self.model, self.texts = model, texts
        self.images = ImageProcessor(model.config.image_size, crop, next(model.parameters()).device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        tokenizer: TextTokenizer | str | Path,
        *,
        crop: bool = True,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Loads a fusion encoder; reads only the weights needed for image-text pairs.

        Args:
            path: exported, imported or released weights, a checkpoint, or a run's output folder.
            tokenizer: text tokenizer of the weights, or the path of its SentencePiece file.
            crop: True crops each image to its largest centred square; False squeezes the whole image into a square.
            options: device, dtype and sizes (`LoadOptions`).

        Raises:
            ConfigError: if the weights or the tokenizer cannot be read, or experts are missing.
        """
        model = load_backbone(path, ("pairs",), **options)
        return cls(model, build_text_processor(tokenizer, model.config), crop=crop)

    @torch.no_grad()
    def __call__(
        self, images: ImageInput | Sequence[ImageInput], texts: str | Sequence[str], *, batch_size: int = 16
    ) -> PairFeatures:
        """Returns the joint features of each image-text pair.

        Args:
            images: one image or several.
            texts: one text per image.
            batch_size: number of pairs per batch.

        Raises:
            ConfigError: if there are no pairs, if the numbers of images and texts differ, or if a text is empty.
            OSError: if a file cannot be read.
            ValueError: if an image is broken.
        """
        images, ids = as_images(images), self.texts(as_texts(texts))
        if len(images) != len(ids) or not ids:
            raise ConfigError(f"{len(images)} images and {len(ids)} texts. Give one text per image, at least one.")
        batches = [
            self.model.encode(pairs=(self.images(images[batch]), ids[batch]))
            for batch in in_batches(len(ids), batch_size)
        ]
        return PairFeatures(
            torch.cat([features.pair_images for features in batches]),
            tuple(text for features in batches for text in features.pair_texts),
        )
