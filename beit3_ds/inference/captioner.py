"""Writes captions of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self, Unpack

from beit3_ds.inference.inputs import (
    ImageInput,
    ImageProcessor,
    TextProcessor,
    as_images,
    build_text_processor,
    in_batches,
)
from beit3_ds.inference.loading import LoadOptions, load_with_head, open_with_head
from beit3_ds.model import TaskModel
from beit3_ds.model.generation import BeamSearch, generate
from beit3_ds.tasks.captioning.head import CaptionHead
from beit3_ds.tokenizers import TextTokenizer


class Captioner:
    """Writes a caption of each image by beam search.

    Attributes:
        model: the model, which takes pairs.
        images: prepares images for the model.
        texts: text processor, whose tokenizer converts the captions' ids to words.
    """

    def __init__(self, model: TaskModel, texts: TextProcessor) -> None:
        self.model, self.texts = model, texts
        self.images = ImageProcessor(model.config.image_size, False, next(model.parameters()).device)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, tokenizer: TextTokenizer | str | Path, **options: Unpack[LoadOptions]
    ) -> Self:
        """Loads a captioner; reads only the weights that image-text pairs need.

        Args:
            path: weights of captioning: exported, imported or released ones, a checkpoint, or a run's output folder.
            tokenizer: the tokenizer of the weights, or its SentencePiece file.
            options: options of loading (`LoadOptions`).

        Raises:
            ConfigError: if the weights or the tokenizer cannot be read, or no head of the weights predicts words.
        """
        weights = open_with_head(path, "heads.mlm.bias", "predicts words")
        model = load_with_head(weights, ("pairs",), CaptionHead, **options)
        return cls(model, build_text_processor(tokenizer, model.config))

    def __call__(
        self, images: ImageInput | Sequence[ImageInput], search: BeamSearch | None = None, *, batch_size: int = 16
    ) -> list[str]:
        """Returns a caption per image.

        Args:
            images: one image or several.
            search: number of beams, length penalty and maximum length; None is `BeamSearch()`.
            batch_size: number of images that are captioned at once; it does not change the captions.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if an image is broken.
        """
        images, tokenizer = as_images(images), self.texts.tokenizer
        captions = [
            caption
            for batch in in_batches(len(images), batch_size)
            for caption in generate(self.model, self.images(images[batch]), tokenizer, search)
        ]
        return [tokenizer.decode(caption.ids) for caption in captions]
