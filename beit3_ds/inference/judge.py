"""Judges statements about two images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self, Unpack

import torch
from torch import Tensor

from beit3_ds.config import ConfigError
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
from beit3_ds.model import TaskModel
from beit3_ds.model.features import pack_inputs
from beit3_ds.tasks.nlvr2.head import StatementHead
from beit3_ds.tokenizers import TextTokenizer

_PAIR_PARTS = (1, 2)  # indices in `layout.PARTS` of the images and texts of pairs


class StatementJudge:
    """Computes the probability that a statement about two images is true (NLVR2).

    Attributes:
        model: model for image-text pairs.
        images: prepares images for the model.
        texts: converts statements to token ids.
    """

    def __init__(self, model: TaskModel, texts: TextProcessor) -> None:
        self.model, self.texts = model, texts
        self.images = ImageProcessor(model.config.image_size, False, next(model.parameters()).device)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, tokenizer: TextTokenizer | str | Path, **options: Unpack[LoadOptions]
    ) -> Self:
        """Loads a model that judges statements; reads only the weights needed for image-text pairs.

        Args:
            path: weights fine-tuned for NLVR2: exported, imported or released weights, a checkpoint, or a run's output
                folder.
            tokenizer: text tokenizer of the weights, or the path of its SentencePiece file.
            options: device, dtype and sizes (`LoadOptions`).

        Raises:
            ConfigError: if the weights or the tokenizer cannot be read, or the weights have no head that judges
                statements.
        """
        weights = open_with_head(path, "heads.input_norm.weight", "judges statements")
        model = load_with_head(weights, ("pairs",), StatementHead, **options)
        return cls(model, build_text_processor(tokenizer, model.config))

    @torch.no_grad()
    def __call__(
        self,
        left: ImageInput | Sequence[ImageInput],
        right: ImageInput | Sequence[ImageInput],
        statements: str | Sequence[str],
        *,
        batch_size: int = 8,
    ) -> Tensor:
        """Returns the probability that each statement is true, (statements,) float32.

        Args:
            left: left image of each statement.
            right: right image of each statement.
            statements: the statements.
            batch_size: number of statements per batch.

        Raises:
            ConfigError: if the numbers of images and statements differ, or a statement is empty.
            OSError: if a file cannot be read.
            ValueError: if an image is broken.
        """
        lefts, rights, ids = as_images(left), as_images(right), self.texts(as_texts(statements))
        if not len(lefts) == len(rights) == len(ids):
            raise ConfigError(
                f"{len(lefts)} left images, {len(rights)} right images and {len(ids)} statements. Give two images per "
                "statement."
            )
        results = [torch.empty(0, device=self.images.device)]
        for part in in_batches(len(ids), batch_size):
            images: list[ImageInput] = []
            for both in zip(lefts[part], rights[part], strict=True):
                images.extend(both)
            pairs = (self.images(images), [text for text in ids[part] for _ in range(2)])
            batch = pack_inputs(self.model.config, None, None, pairs, self.images.device)
            logits = head_output(self.model, batch, batch.layout.first_rows(*_PAIR_PARTS))
            results.append(logits.softmax(1)[:, 1])
        return torch.cat(results)
