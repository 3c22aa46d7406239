"""Encodes images and texts separately into comparable features (paper figure 3, dual encoder)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self, Unpack

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.inference.head_output import head_output
from beit3_ds.inference.inputs import (
    ImageInput,
    ImageProcessor,
    TextProcessor,
    as_images,
    as_texts,
    build_text_processor,
    in_batches,
)
from beit3_ds.inference.loading import LoadOptions, load_with_head, open_with_head
from beit3_ds.model import StepFeatures, TaskModel
from beit3_ds.model.features import pack_inputs
from beit3_ds.tasks.retrieval.head import IMAGE_FEATURES, SCALE, TEXT_FEATURES, ContrastiveHead
from beit3_ds.tokenizers import TextTokenizer

_IMAGES, _TEXTS = 0, 3  # indices into `layout.PARTS`


class DualEncoder:
    """Computes comparable features of images and of texts, with the heads from contrastive training.

    Attributes:
        model: model for images and texts.
        images: prepares images for the model.
        texts: converts texts to token ids.
    """

    def __init__(self, model: TaskModel, texts: TextProcessor) -> None:
        self.model, self.texts = model, texts
        self.images = ImageProcessor(model.config.image_size, False, next(model.parameters()).device)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, tokenizer: TextTokenizer | str | Path, **options: Unpack[LoadOptions]
    ) -> Self:
        """Loads a dual encoder; does not read vision-language experts.

        Args:
            path: weights fine-tuned for retrieval: exported, imported or released weights, a checkpoint, or a run's
                output folder.
            tokenizer: text tokenizer of the weights, or the path of its SentencePiece file.
            options: device, dtype and sizes (`LoadOptions`).

        Raises:
            ConfigError: if the weights or the tokenizer cannot be read, or the weights have no heads that compare
                images with texts.
        """
        weights = open_with_head(path, "heads.image.weight", "compares images with texts")
        model = load_with_head(weights, ("images", "texts"), ContrastiveHead, **options)
        return cls(model, build_text_processor(tokenizer, model.config))

    @torch.no_grad()
    def encode_images(self, images: ImageInput | Sequence[ImageInput], *, batch_size: int = 32) -> Tensor:
        """Returns the features of images, (images, hidden size) float32, normalised to length 1.

        Args:
            images: one image or several.
            batch_size: number of images per batch.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if an image is broken.
        """
        images = as_images(images)
        parts = [
            self._features(pack_inputs(self.model.config, self.images(images[batch]), None, None, self.images.device))
            for batch in in_batches(len(images), batch_size)
        ]
        return torch.cat([part.rows[IMAGE_FEATURES] for part in parts]) if parts else self._nothing()

    @torch.no_grad()
    def encode_texts(self, texts: str | Sequence[str], *, batch_size: int = 64) -> Tensor:
        """Returns the features of texts, (texts, hidden size) float32, normalised to length 1.

        Args:
            texts: one text or several.
            batch_size: number of texts per batch.

        Raises:
            ConfigError: if a text is empty.
        """
        ids = self.texts(as_texts(texts))
        parts = [
            self._features(pack_inputs(self.model.config, None, ids[batch], None, self.images.device))
            for batch in in_batches(len(ids), batch_size)
        ]
        return torch.cat([part.rows[TEXT_FEATURES] for part in parts]) if parts else self._nothing()

    def __call__(self, images: ImageInput | Sequence[ImageInput], texts: str | Sequence[str]) -> Tensor:
        """Returns the similarity of every image to every text, (images, texts): the cosine times the learned scale.

        A softmax over the texts gives the probability of each text for an image.
        """
        return self.scale * self.encode_images(images) @ self.encode_texts(texts).T

    @property
    def scale(self) -> float:
        """Returns the learned factor for cosine similarities."""
        batch = pack_inputs(self.model.config, None, [[0]], None, self.images.device)
        with torch.no_grad():
            return float(self._features(batch).shared[SCALE])

    def _features(self, batch: PackedBatch) -> StepFeatures:
        features: StepFeatures = head_output(self.model, batch, batch.layout.first_rows(_IMAGES, _TEXTS))
        return features

    def _nothing(self) -> Tensor:
        return torch.empty(0, self.model.config.hidden_size, device=self.images.device)
