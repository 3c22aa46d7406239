"""Answers questions about images."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self, Unpack

import torch

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
from beit3_ds.tasks.vqa.answer_list import read_stored_answers
from beit3_ds.tasks.vqa.answers import AnswerVocabulary
from beit3_ds.tasks.vqa.head import AnswerHead
from beit3_ds.tokenizers import TextTokenizer

_IMAGES_OF_PAIRS = 1  # index into `layout.PARTS`


class Answer(NamedTuple):
    """One answer of the model to a question."""

    text: str
    """Text of the answer, taken from the fixed list of answers."""
    score: float
    """Estimated probability that people give this answer, from 0 to 1. The scores of all answers need not sum to 1."""


class QuestionAnswerer:
    """Answers questions about images by choosing from a fixed list of answers (VQAv2).

    Attributes:
        model: model for image-text pairs.
        answers: list of answers.
        images: prepares images for the model.
        texts: converts questions to token ids.
    """

    def __init__(self, model: TaskModel, texts: TextProcessor, answers: Sequence[str]) -> None:
        self.model, self.texts, self.answers = model, texts, list(answers)
        self.images = ImageProcessor(model.config.image_size, False, next(model.parameters()).device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        tokenizer: TextTokenizer | str | Path,
        answers: str | Path | None = None,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Loads a model that answers questions; reads only the weights needed for image-text pairs.

        Args:
            path: weights fine-tuned for VQAv2: exported, imported or released weights, a checkpoint, or a run's output
                folder.
            tokenizer: text tokenizer of the weights, or the path of its SentencePiece file.
            answers: file with the list of answers, such as a run's `answers.jsonl` or unilm's `answer2label.txt`. None
                takes the list stored with the weights. Released weights contain no list.
            options: device, dtype and sizes (`LoadOptions`).

        Raises:
            ConfigError: if a file cannot be read, if the weights have no head that answers questions, or if no list of
                answers fits the head.
        """
        weights = open_with_head(path, "heads.answers.bias", "answers questions")
        (count,) = weights.shape("heads.answers.bias")
        found = AnswerVocabulary.load(Path(answers)) if answers else read_stored_answers(weights.task)
        if found is None:
            raise ConfigError(
                f"{path} has no list of answers. Name the file of the list that belongs to the weights (answers), "
                "such as the run's answers.jsonl or the reference's answer2label.txt."
            )
        if len(found) != count:
            raise ConfigError(f"{answers or path}: {len(found)} answers, but the head has {count}. Name its own list.")
        model = load_with_head(weights, ("pairs",), lambda config, tensor: AnswerHead(config, count, tensor), **options)
        return cls(model, build_text_processor(tokenizer, model.config), list(found))

    @torch.no_grad()
    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput],
        questions: str | Sequence[str],
        *,
        top: int = 1,
        batch_size: int = 16,
    ) -> list[list[Answer]]:
        """Returns the `top` most probable answers to each question, most probable first.

        Args:
            images: one image or several.
            questions: one question per image.
            top: number of answers per question.
            batch_size: number of questions per batch.

        Raises:
            ConfigError: if the numbers of images and questions differ, or a question is empty.
            OSError: if a file cannot be read.
            ValueError: if an image is broken.
        """
        images, ids = as_images(images), self.texts(as_texts(questions))
        if len(images) != len(ids):
            raise ConfigError(f"{len(images)} images and {len(ids)} questions. Give one question per image.")
        results: list[list[Answer]] = []
        for part in in_batches(len(ids), batch_size):
            pairs = (self.images(images[part]), ids[part])
            batch = pack_inputs(self.model.config, None, None, pairs, self.images.device)
            scores = head_output(self.model, batch, batch.layout.first_rows(_IMAGES_OF_PAIRS)).sigmoid()
            best = scores.topk(min(top, scores.shape[1]))
            for values, labels in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                results.append(
                    [Answer(self.answers[label], value) for value, label in zip(values, labels, strict=True)]
                )
        return results
