"""Generates captions of images."""

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
    """Generates a caption of each image by beam search.

    Attributes:
        model: model for image-text pairs.
        images: prepares images for the model.
        texts: text processor, whose tokenizer converts token ids to words.
    """

    def __init__(self, model: TaskModel, texts: TextProcessor) -> None:
        self.model, self.texts = model, texts
        self.images = ImageProcessor(model.config.image_size, False, next(model.parameters()).device)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, tokenizer: TextTokenizer | str | Path, **options: Unpack[LoadOptions]
    ) -> Self:
        """Loads a captioner; reads only the weights needed for image-text pairs.

        Args:
            path: weights fine-tuned for captioning: exported, imported or released weights, a checkpoint, or a run's
                output folder.
            tokenizer: text tokenizer of the weights, or the path of its SentencePiece file.
            options: device, dtype and sizes (`LoadOptions`).

        Raises:
            ConfigError: if the weights or the tokenizer cannot be read, or the weights have no head that predicts
                words.
        """
        weights = open_with_head(path, "heads.mlm.bias", "predicts words")
        model = load_with_head(weights, ("pairs",), CaptionHead, **options)
        return cls(model, build_text_processor(tokenizer, model.config))

    def __call__(
        self, images: ImageInput | Sequence[ImageInput], search: BeamSearch | None = None, *, batch_size: int = 16
    ) -> list[str]:
        """Returns one caption per image.

        Args:
            images: one image or several.
            search: number of beams, length penalty and maximum length; None uses the defaults of `BeamSearch`.
            batch_size: number of images per batch; does not affect the captions.

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
