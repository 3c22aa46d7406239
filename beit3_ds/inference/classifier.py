"""Classifies images, either by comparison with class names (paper section 3.2) or with a linear layer."""

# I images, C classes, D hidden.

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Self, Unpack

import torch
from torch import Tensor

from beit3_ds.config import ConfigError
from beit3_ds.inference.dual_encoder import DualEncoder
from beit3_ds.inference.head_output import head_output
from beit3_ds.inference.inputs import ImageInput, ImageProcessor, as_images, in_batches
from beit3_ds.inference.loading import LoadOptions, load_with_head
from beit3_ds.model.features import pack_inputs
from beit3_ds.tasks.imagenet.head import LinearClassHead, patch_rows
from beit3_ds.tokenizers import TextTokenizer
from beit3_ds.weights.reader import OpenedWeights, open_weights

LogitsOf = Callable[[Sequence[ImageInput], int], Tensor]
"""Function that maps images and a batch size to logits, (images, classes)."""

_LINEAR = "heads.classes.bias"


class Class(NamedTuple):
    """One predicted class of an image."""

    name: str
    """Name of the class."""
    probability: float
    """Probability of the class, from 0 to 1; the probabilities of all classes sum to 1."""


class ImageClassifier:
    """Classifies images, either by comparison with class names or with a linear layer.

    Attributes:
        names: names of the classes.
    """

    def __init__(self, logits_of: LogitsOf, names: Sequence[str]) -> None:
        self.names, self._logits_of = list(names), logits_of

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        names: Sequence[str],
        tokenizer: TextTokenizer | str | Path | None = None,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Loads a classifier.

        If the weights contain a linear layer, the classifier applies this layer, and needs no tokenizer and no language
        experts. Otherwise, the weights must come from fine-tuning for retrieval, or for ImageNet with class names. The
        classifier then compares images with class names.

        Args:
            path: exported, imported or released weights, a checkpoint, or a run's output folder.
            names: names of the classes; for a linear layer, in the order of its outputs.
            tokenizer: text tokenizer of the weights, or the path of its SentencePiece file; None for a linear layer.
            options: device, dtype and sizes (`LoadOptions`).

        Raises:
            ConfigError: if a file cannot be read, if the weights have no head that classifies, or if `names` or
                `tokenizer` does not fit the head.
        """
        if isinstance(names, str) or not names:
            raise ConfigError(f"names of classes: {names!r}. Give a list with the name of each class.")
        weights = open_weights(path)
        if _LINEAR in weights.names():
            return cls(_linear_logits(weights, len(names), **options), names)
        if tokenizer is None:
            raise ConfigError(f"{path} compares images with names, which need a tokenizer. Name its file (tokenizer).")
        encoder = DualEncoder.from_pretrained(path, tokenizer, **options)
        prompt = str((weights.task or {}).get("prompt", "{name}"))
        return cls(_name_logits(encoder, [prompt.replace("{name}", name) for name in names]), names)

    @torch.no_grad()
    def probabilities(self, images: ImageInput | Sequence[ImageInput], *, batch_size: int = 32) -> Tensor:
        """Returns the probability of every class for every image, (images, classes) float32; each row sums to 1."""
        return self._logits_of(as_images(images), batch_size).softmax(1)

    def __call__(
        self, images: ImageInput | Sequence[ImageInput], *, top: int = 5, batch_size: int = 32
    ) -> list[list[Class]]:
        """Returns the `top` most probable classes of each image, most probable first.

        Args:
            images: one image or several.
            top: number of classes per image.
            batch_size: number of images per batch.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if an image is broken.
        """
        best = self.probabilities(images, batch_size=batch_size).topk(min(top, len(self.names)))
        return [
            [Class(self.names[label], value) for value, label in zip(values, labels, strict=True)]
            for values, labels in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def _name_logits(encoder: DualEncoder, texts: Sequence[str]) -> LogitsOf:
    features_CD, scale = encoder.encode_texts(texts), encoder.scale

    def logits_of(images: Sequence[ImageInput], batch_size: int) -> Tensor:
        return scale * encoder.encode_images(images, batch_size=batch_size) @ features_CD.T

    return logits_of


def _linear_logits(weights: OpenedWeights, num_names: int, **options: Unpack[LoadOptions]) -> LogitsOf:
    (count,) = weights.shape(_LINEAR)
    if count != num_names:
        raise ConfigError(f"{weights.path} has {count} classes, but there are {num_names} names. Give {count} names.")
    model = load_with_head(
        weights, ("images",), lambda config, tensor: LinearClassHead(config, count, tensor), **options
    )
    config, device = model.config, next(model.parameters()).device
    prepare = ImageProcessor(config.image_size, False, device)

    def logits_of(images: Sequence[ImageInput], batch_size: int) -> Tensor:
        logits = [torch.empty(0, count, device=device)]
        for part in in_batches(len(images), batch_size):
            batch = pack_inputs(config, prepare(images[part]), None, None, device)
            logits.append(head_output(model, batch, patch_rows(batch.layout)))
        return torch.cat(logits)

    return logits_of
