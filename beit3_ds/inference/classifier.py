"""Classifies images by the names of classes, as retrieval does (paper section 3.2)."""

# I images, C classes.

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self, Unpack

import torch
from torch import Tensor

from beit3_ds.config import ConfigError
from beit3_ds.inference.dual_encoder import DualEncoder
from beit3_ds.inference.inputs import ImageInput
from beit3_ds.inference.loading import LoadOptions
from beit3_ds.tokenizers import TextTokenizer


class Class(NamedTuple):
    """Holds a class that an image may have."""

    name: str
    """Name of the class."""
    probability: float
    """Probability among all classes, from 0 to 1."""


class ImageClassifier:
    """Classifies images by comparing them with the names of classes, which need not occur in training.

    Attributes:
        encoder: encodes images and names.
        names: names of the classes.
    """

    def __init__(self, encoder: DualEncoder, names: Sequence[str]) -> None:
        """Encodes the names, once.

        Raises:
            ConfigError: if there are no names, or a name occurs twice.
        """
        if not names or len(set(names)) < len(names):
            twice = next((name for name in names if list(names).count(name) > 1), None)
            fault = f"{twice!r} occurs twice" if names else "there are none"
            raise ConfigError(f"names of classes: {fault}. Give each class a name of its own.")
        self.encoder, self.names = encoder, list(names)
        self._features_CD, self._scale = encoder.encode_texts(self.names), encoder.scale

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        tokenizer: TextTokenizer | str | Path,
        names: Sequence[str],
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Loads a dual encoder and encodes the names of classes.

        Args:
            path: weights of retrieval or of ImageNet as retrieval (`DualEncoder.from_pretrained`).
            tokenizer: the tokenizer of the weights, or its SentencePiece file.
            names: names of the classes.
            options: options of loading (`LoadOptions`).

        Raises:
            ConfigError: as `DualEncoder.from_pretrained`, and if there are no names, or a name occurs twice.
        """
        return cls(DualEncoder.from_pretrained(path, tokenizer, **options), names)

    @torch.no_grad()
    def probabilities(self, images: ImageInput | Sequence[ImageInput], *, batch_size: int = 32) -> Tensor:
        """Returns the probability of every class for every image, (I, C) float32."""
        features_ID = self.encoder.encode_images(images, batch_size=batch_size)
        return (self._scale * features_ID @ self._features_CD.T).softmax(1)

    def __call__(
        self, images: ImageInput | Sequence[ImageInput], *, top: int = 5, batch_size: int = 32
    ) -> list[list[Class]]:
        """Returns the most likely classes of each image, most likely first.

        Args:
            images: one image or several.
            top: number of classes per image.
            batch_size: number of images that are computed at once.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if an image is broken.
        """
        best = self.probabilities(images, batch_size=batch_size).topk(min(top, len(self.names)))
        return [
            [Class(self.names[label], value) for value, label in zip(values, labels, strict=True)]
            for values, labels in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
