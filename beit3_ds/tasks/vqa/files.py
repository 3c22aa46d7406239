"""Reads questions about images: VQAv2, Visual Genome, and custom questions in JSON lines.

| format | questions | answers | image of a question |
|---|---|---|---|
| VQAv2 | `v2_OpenEnded_mscoco_*_questions.json` | `v2_mscoco_*_annotations.json` | `COCO_{split}_{image_id:012}.jpg` |
| Visual Genome | `question_answers.json` | in the same file | last two parts of the URL in `image_data.json` |
| JSON lines | objects with `question`, `image`, and optionally `id` | `answers`, or `answer` | path `image` |

Entries are parsed one at a time. VQAv2's training annotations have 365 MB and would take 2.5 GB as Python objects.
"""

import json
import os
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from beit3_ds.config import ConfigError
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.json_lines import iterate_json_lines
from beit3_ds.data.files.json_lists import iterate_json_list, read_json_members, reading_as
from beit3_ds.data.images.annotated import NO_IMAGE, CollectedAnnotations, describe_files
from beit3_ds.data.images.compact_strings import CompactStrings
from beit3_ds.tasks.vqa.answers import main_answer

_QUESTIONS_FORM = "an object with 'questions' (question_id, image_id, question)"
_ANNOTATIONS_FORM = "an object with 'annotations' (question_id, multiple_choice_answer, answers)"


class VqaQuestions(CollectedAnnotations):
    """Holds questions about images and, if the split has answers, the answers that people gave.

    Each question is one sample, and `caption` returns its text. A question takes about 200 bytes of memory besides its
    text.
    """

    def __init__(self, questions: str, folder: str, *further_files: str) -> None:
        """Creates an empty collection of questions.

        Args:
            questions: path of the questions file.
            folder: folder of the images.
            further_files: paths of other files with data of the samples; `files` also yields these files.
        """
        super().__init__(questions, folder)
        self._further_files = further_files
        self._identifiers, self._answers, self._main_answers = CompactStrings(), CompactStrings(), CompactStrings()
        self._type_numbers: dict[tuple[str, str], int] = {}
        self._types: list[tuple[str, str]] = []
        self._sample_types = array("l")

    def add_question(self, identifier: int | str, image_number: int, question: str, line: int | None = None) -> None:
        """Adds a question without answers.

        Args:
            identifier: id of the question in results.
            image_number: number of the question's image, as returned by `add_image`; or `NO_IMAGE`.
            question: text of the question.
            line: line number of the question in its file, for messages; None if the file is not in JSON lines.
        """
        self.add_sample(image_number, question, line)
        self._identifiers.append(json.dumps(identifier))

    def add_answers(self, answers: list[str], main: str = "", question_type: str = "", answer_type: str = "") -> None:
        """Stores the answers of the next question: the first one that has no answers yet.

        Args:
            answers: answers that people gave; ten in the official files.
            main: main answer in the file; if empty, the most frequent answer becomes the main answer.
            question_type: type of the question, such as "what color"; empty if unknown.
            answer_type: type of the answer, such as "yes/no"; empty if unknown.
        """
        self._answers.append(json.dumps(answers))
        self._main_answers.append(main or main_answer(answers))
        types = (question_type, answer_type)
        if types not in self._type_numbers:
            self._type_numbers[types] = len(self._types)
            self._types.append(types)
        self._sample_types.append(self._type_numbers[types])

    def files(self) -> Iterator[SourceFile]:
        """Yields the name, size in bytes and number of samples of the questions file, then of the other files.

        Raises:
            ConfigError: if a file no longer exists.
        """
        yield from super().files()
        for path, (num_bytes, _) in zip(self._further_files, describe_files(self._further_files), strict=True):
            yield SourceFile(os.path.basename(path), num_bytes, 0)

    def identifier(self, index: int) -> int | str:
        """Returns the id of a question in its file; JSON lines without ids are numbered from 0."""
        identifier: int | str = json.loads(self._identifiers[index])
        return identifier

    @property
    def num_answered(self) -> int:
        """Returns the number of questions with answers; these are the first questions of the collection."""
        return len(self._answers)

    @property
    def has_answers(self) -> bool:
        """Returns whether all questions have answers; questions of a test split have none."""
        return self.num_answered == len(self)

    def answers(self, index: int) -> list[str]:
        """Returns the answers that people gave to a question.

        Raises:
            ConfigError: if one of the collection's questions has no answers, even if it is another question.
        """
        self.check_has_answers()
        answers: list[str] = json.loads(self._answers[index])
        return answers

    def types(self, index: int) -> tuple[str, str]:
        """Returns the type of a question and the type of its answer; each is empty if unknown."""
        return self._types[self._sample_types[index]] if index < len(self._sample_types) else ("", "")

    def main_answers(self) -> Iterator[str]:
        """Yields the main answer to every question, for building the answer list.

        Raises:
            ConfigError: if a question of the collection has no answers.
        """
        self.check_has_answers()
        return (self._main_answers[index] for index in range(len(self)))

    def check_has_answers(self) -> None:
        """Checks that all questions have answers.

        Raises:
            ConfigError: if a question has no answers; the message names the questions file.
        """
        if not self.has_answers:
            raise ConfigError(
                f"vqa: the questions of {self.annotations} have no answers, as those of a test split. They can be "
                "answered and submitted, but neither trained on nor scored. Name the file with their 'annotations'."
            )


def read_vqav2(questions: str, annotations: str, images: str, split: str = "") -> VqaQuestions:
    """Reads a split of VQAv2 (Goyal et al., 2017, arXiv:1612.00837): one sample per question, in the order of the file.

    Args:
        questions: path of the official questions file.
        annotations: path of the official answers file; empty for a test split, which has no answers.
        images: folder of the images, such as `val2014`, or the parent folder of `val2014`.
        split: split in the names of the images, such as `val2014`; if empty, `data_subtype` in the questions file is
            used.

    Raises:
        ConfigError: if a file cannot be read or does not have the official form, if a question occurs twice, or if the
            two files have different questions; the message names the entry.
    """
    split = split or _split_of(questions)
    prefix = f"{split}/" if os.path.isdir(os.path.join(images, split)) else ""
    samples = VqaQuestions(questions, images, *filter(None, (annotations,)))
    places: dict[object, int] = {}
    image_numbers: dict[int, int] = {}
    with reading_as(questions, _QUESTIONS_FORM):
        for number, entry in enumerate(iterate_json_list(questions, "questions")):
            _check_new(places, entry["question_id"], number, f"{questions}: entry {number} of 'questions'")
            image = int(entry["image_id"])
            if image not in image_numbers:
                image_numbers[image] = samples.add_image(f"{prefix}COCO_{split}_{image:012}.jpg")
            samples.add_question(entry["question_id"], image_numbers[image], entry["question"])
    if annotations:
        _add_annotations(samples, annotations, places)
    return samples


def _split_of(questions: str) -> str:
    """Reads the split of the images, such as `val2014`, from the file `questions`.

    For questions of `test-dev2015`, returns `test2015`, which is the split in the names of the images.

    Raises:
        ConfigError: if the file does not name the split.
    """
    with reading_as(questions, _QUESTIONS_FORM):
        split = read_json_members(questions, "data_subtype").get("data_subtype")
    if not split or not isinstance(split, str):
        raise ConfigError(
            f"vqa: {questions} does not say the split of its images ('data_subtype'). Set the source's 'split', such "
            "as train2014: it is part of the names of the images."
        )
    return split.replace("test-dev", "test")


def _add_annotations(samples: VqaQuestions, annotations: str, places: dict[object, int]) -> None:
    """Adds the answers of an official file, which may list the questions in another order."""
    found: list[Any] = [None] * len(samples)
    seen: dict[object, int] = {}
    texts: dict[str, str] = {}  # one object per text, because VQAv2's 4.4 million answers have few distinct texts
    with reading_as(annotations, _ANNOTATIONS_FORM):
        for number, entry in enumerate(iterate_json_list(annotations, "annotations")):
            where, question = f"{annotations}: entry {number} of 'annotations'", entry["question_id"]
            _check_new(seen, question, number, where)
            if question not in places:
                raise ConfigError(
                    f"vqa: {where} answers question {question!r}, which {samples.annotations} does not ask. Take the "
                    "two files from the same split."
                )
            answers = [_one(texts, answer["answer"]) for answer in entry["answers"]]
            if not answers:
                raise ConfigError(f"vqa: {where} has no answers to question {question!r}. Fetch the file again.")
            keys = ("multiple_choice_answer", "question_type", "answer_type")
            found[places[question]] = (answers, *(_one(texts, entry.get(key, "")) for key in keys))
    for place, annotation in enumerate(found):
        if annotation is None:
            raise ConfigError(
                f"vqa: {samples.annotations}: question {samples.identifier(place)!r} (entry {place} of 'questions') "
                f"has no annotation in {annotations}, which has {len(seen):,} for {len(samples):,} questions. Take "
                "both files from the same split."
            )
        samples.add_answers(*annotation)


def _one(texts: dict[str, str], text: object) -> str:
    """Returns one shared string object for equal texts, to save memory."""
    return texts.setdefault(str(text), str(text))


def read_visual_genome_questions(question_answers: str, image_data: str, folder: str) -> VqaQuestions:
    """Reads the questions of Visual Genome (Krishna et al., 2017, arXiv:1602.07332); each question has one answer.

    Args:
        question_answers: path of a JSON list of images with the keys `id` and `qas`. `qas` is a list of questions with
            the keys `qa_id`, `question` and `answer`.
        image_data: path of a JSON list of images with the keys `image_id` and `url`.
        folder: folder with the image folders `VG_100K` and `VG_100K_2`.

    Raises:
        ConfigError: if a file cannot be read or does not have Visual Genome's form, or a question occurs twice.
    """
    samples = VqaQuestions(question_answers, folder, image_data)
    with reading_as(image_data, "a list of objects with 'image_id' and 'url'"):
        numbers = {
            image["image_id"]: samples.add_image("/".join(image["url"].split("/")[-2:]))
            for image in iterate_json_list(image_data)
        }
    places: dict[object, int] = {}
    with reading_as(question_answers, "a list of objects with 'id' and 'qas' (qa_id, question, answer)"):
        for number, image in enumerate(iterate_json_list(question_answers)):
            for entry in image["qas"]:
                _check_new(places, entry["qa_id"], number, f"{question_answers}: entry {number}")
                samples.add_question(entry["qa_id"], numbers.get(image["id"], NO_IMAGE), entry["question"])
                samples.add_answers([str(entry["answer"])])
    return samples


def read_vqa_lines(path: str, folder: str) -> VqaQuestions:
    """Reads questions about images from JSON lines.

    Args:
        path: file with one JSON object per line. The keys are `question`, `image` (path in the folder), and optionally
            `id`, `question_type` and `answer_type`. A line may also have people's answers: `answers` (a list of
            strings) or `answer` (one string). If one line has answers, all lines must have them.
        folder: folder of the images.

    Raises:
        ConfigError: if the file cannot be read, if a line lacks a key or has an invalid value, if an id occurs twice,
            or if only some questions have answers; the message names the line.
    """
    samples = VqaQuestions(path, folder)
    places: dict[object, int] = {}
    images: dict[str, int] = {}
    for number, line in iterate_json_lines(path, {"question": str, "image": str}):
        where = f"{path}:{number}"
        identifier = line.get("id", len(samples))
        _check_new(places, identifier, number, where)
        image = line["image"]
        if image not in images:
            images[image] = samples.add_image(image)
        samples.add_question(identifier, images[image], line["question"], number)
        answers = _answers_of_line(line, where)
        if (answers is None) != (samples.num_answered == 0) and len(samples) > 1:
            raise ConfigError(
                f"vqa: {where} has {'no ' if answers is None else ''}answers, but the lines before have "
                f"{'some' if samples.num_answered else 'none'}. Give answers in all lines or in none."
            )
        if answers is not None:
            samples.add_answers(answers, "", str(line.get("question_type", "")), str(line.get("answer_type", "")))
    return samples


def _answers_of_line(line: Mapping[str, Any], where: str) -> list[str] | None:
    """Returns the answers in a line; None if the line has no answers."""
    answers = line.get("answers", [line["answer"]] if "answer" in line else None)
    if answers is None:
        return None
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ConfigError(
            f"vqa: {where}: 'answers' must be a list of one or more texts (or 'answer' one text), not "
            f"{str(answers)[:80]!r}. Leave them out of all lines for questions without answers."
        )
    return answers


def _check_new(places: dict[object, int], identifier: object, number: int, where: str) -> None:
    """Stores where an id occurs; raises `ConfigError` if the id is repeated, or is neither int nor str."""
    if not isinstance(identifier, int | str):
        raise ConfigError(f"vqa: {where}: the id {identifier!r} is neither a number nor a text.")
    if identifier in places:
        raise ConfigError(
            f"vqa: {where}: the question id {identifier!r} occurs twice (first at {places[identifier]}). Every "
            "question needs an id of its own, or it would count twice."
        )
    places[identifier] = number
