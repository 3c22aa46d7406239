"""Opens questions about images, and prepares each question as one image-text pair with target scores."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit3_ds.config import ConfigError, RunConfig, SourceConfig
from beit3_ds.config.data import Split
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.records import BrokenRecordError, Skipped
from beit3_ds.data.images.one_view import PairView, build_pair_view
from beit3_ds.data.samples import SampleKey, Stream
from beit3_ds.data.sources import ConcatSources, check_no_image_is_missing, check_no_sample_twice
from beit3_ds.tasks.vqa.answers import AnswerVocabulary
from beit3_ds.tasks.vqa.files import VqaQuestions, read_visual_genome_questions, read_vqa_lines, read_vqav2
from beit3_ds.tokenizers.text import TextTokenizer

FORMATS = ("vqav2", "visual_genome_questions", "vqa_lines")
"""Names of the source formats of this task: VQAv2, Visual Genome and JSON lines (`tasks/vqa/files.py`)."""


class VqaSample(NamedTuple):
    """Holds a tokenized question, its image, and the target score of each answer."""

    name: str
    """Name of the sample for messages: questions file, line number or question number in this file, and image path."""
    sample_index: int
    """Index of the question in its split, from 0."""
    view: Tensor
    """Image after augmentation or resizing, (3, size, size) float32 in [-1, 1]."""
    ids: NDArray[np.int64]
    """Token ids of the question, with BOS and EOS, (tokens,)."""
    scores: Tensor
    """Target score of each answer, (answers,) float32; all zero if people gave no answers."""


@dataclass(frozen=True, kw_only=True)
class VqaSamples:
    """Prepares the questions of one source."""

    is_last_open: ClassVar[bool] = False

    questions: VqaQuestions
    """Questions of the source, with the answers that people gave if the split has answers."""
    vocabulary: AnswerVocabulary
    """List of possible answers of the model."""
    view: PairView
    """Augments or resizes an image to the model's image size."""
    tokenizer: TextTokenizer
    """Converts questions to token ids."""
    length: int
    """Maximum number of tokens per question, with BOS and EOS; longer questions are cut off."""

    def __len__(self) -> int:
        """Returns the number of questions."""
        return len(self.questions)

    def files(self) -> Iterable[SourceFile]:
        """Returns the name, size in bytes and number of samples for each annotation file."""
        return self.questions.files()

    def image_files(self) -> Iterable[str]:
        """Returns the paths of the images of all questions."""
        return self.questions.image_files()

    def identity(self, index: int) -> bytes:
        """Returns the question's id as bytes; a resumed run recognises questions by these bytes."""
        return str(self.questions.identifier(index)).encode("utf-8", "surrogatepass")

    def name(self, index: int) -> str:
        """Returns the question's file and the question's number in the file, for messages."""
        return self.questions.name(index)

    def skipped(self) -> dict[str, Skipped]:
        """Returns the number of skipped entries for each reason, with an example."""
        return self.questions.skipped

    def prepare(self, index: int, key: SampleKey) -> VqaSample:
        """Reads question `index` and its image; `key` seeds the augmentation of the image.

        Raises:
            BrokenRecordError: if the image or the question cannot be read, or the question has no tokens.
        """
        image, text = self.questions.pair(index, self.view.min_side)
        pieces = self.tokenizer.encode(text)[: self.length - 2]
        if not pieces:
            raise BrokenRecordError(f"{self.name(index)}: the question holds nothing that the tokenizer keeps")
        scores = torch.zeros(len(self.vocabulary))
        answers = self.questions.answers(index) if self.questions.has_answers else ()
        for label, score in self.vocabulary.targets(answers).items() if answers else ():
            scores[label] = score
        return VqaSample(
            name=self.name(index),
            sample_index=key.index,
            view=self.view.of(text, *answers)(image, key.rng("view")),
            ids=np.array([self.tokenizer.bos_id, *pieces, self.tokenizer.eos_id], dtype=np.int64),
            scores=scores,
        )


def open_questions(source: SourceConfig) -> VqaQuestions:
    """Opens a source of questions, and checks all entries and that all images exist.

    Raises:
        ConfigError: if a file cannot be read, if an image is missing, or if a question is empty; the message names the
            file and the entry.
    """
    _check_keys(source)
    match source.format:
        case "vqav2":
            questions = read_vqav2(source.path, source.annotations, source.images, source.split)
        case "visual_genome_questions":
            questions = read_visual_genome_questions(source.path, source.annotations, source.images)
        case _:
            questions = read_vqa_lines(source.path, source.images)
    if not len(questions):
        raise ConfigError(f"vqa: {source.path} has no questions. Name another file.")
    check_no_image_is_missing(questions)
    for index in range(len(questions)):
        try:
            questions.caption(index)
        except BrokenRecordError as error:
            raise ConfigError(f"vqa: {error}. Correct the question, or remove it from the file.") from error
    return questions


def build_stream(
    config: RunConfig, opened: list[VqaQuestions], vocabulary: AnswerVocabulary, tokenizer: TextTokenizer, split: Split
) -> Stream:
    """Joins the question sources of a split to one sequence of samples."""
    view = build_pair_view(config, split)
    return Stream(
        ConcatSources(
            [
                VqaSamples(
                    questions=questions,
                    vocabulary=vocabulary,
                    view=view,
                    tokenizer=tokenizer,
                    length=config.data.pair_text_length,
                )
                for questions in opened
            ]
        )
    )


def open_split(config: RunConfig, split: Split) -> list[VqaQuestions]:
    """Opens the questions of all sources of a split.

    Raises:
        ConfigError: if a source is invalid (`open_questions`), a training or validation question has no answers, or two
            sources of a validation or test split share a question id.
    """
    sources = getattr(config.data.pairs, split)
    check_no_sample_twice(sources)
    opened = [open_questions(source) for source in sources]
    if split != "test":
        for questions in opened:
            questions.check_has_answers()
    if split != "train" and len(opened) > 1:
        _check_ids_differ(opened)
    return opened


def _check_keys(source: SourceConfig) -> None:
    needs_file = source.format == "visual_genome_questions"
    if not source.images:
        raise ConfigError(
            f"data.pairs: source '{source.path}' of format {source.format} needs 'images': the folder of its images, "
            "or a pattern of tars."
        )
    if needs_file and not source.annotations:
        raise ConfigError(
            f"data.pairs: source '{source.path}' of format {source.format} needs 'annotations': the path of "
            "image_data.json."
        )
    if source.format == "vqa_lines" and (source.annotations or source.split):
        raise ConfigError(
            f"data.pairs: source '{source.path}' of format vqa_lines has its answers in the same file; remove "
            "'annotations' and 'split'."
        )


def _check_ids_differ(opened: list[VqaQuestions]) -> None:
    places: dict[int | str, str] = {}
    for questions in opened:
        for index in range(len(questions)):
            identifier = questions.identifier(index)
            if identifier in places:
                raise ConfigError(
                    f"vqa: {questions.name(index)} has the id {identifier!r}, as has {places[identifier]}. Ids must "
                    "differ over all sources of a split, because results name questions by them."
                )
            places[identifier] = questions.name(index)
