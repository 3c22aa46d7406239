"""Determines the list of possible answers of a run, and checks that the weights were trained with this list."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beit3_ds.config import ConfigError
from beit3_ds.tasks.vqa.answers import AnswerVocabulary
from beit3_ds.tasks.vqa.config import VqaConfig
from beit3_ds.tasks.vqa.files import VqaQuestions

ANSWERS_FILE = "answers.jsonl"
"""Name of the answer list in the output folder of a run."""


def read_stored_answers(described: Mapping[str, Any] | None) -> AnswerVocabulary | None:
    """Returns the answer list that is stored with weights; None if there is none.

    Args:
        described: result of `Vqa.describe` in the run that trained the weights; None if unknown.
    """
    answers = (described or {}).get("answers")
    return AnswerVocabulary(answers) if answers else None


def choose_answers(
    settings: VqaConfig,
    training: Sequence[VqaQuestions],
    stored: AnswerVocabulary | None,
    where: str,
) -> AnswerVocabulary:
    """Returns the answer list of a run or an evaluation.

    The list comes from the file `task.answer_list`. Without this file, the list is built from the training answers or,
    in an evaluation, read from the weights.

    Args:
        settings: the task's settings.
        training: questions of the training split; empty in an evaluation.
        stored: answer list of the loaded weights; None if the weights have no list.
        where: name of the loaded weights, for messages.

    Raises:
        ConfigError: if there is no list, if the number of its answers is not `task.num_answers`, or if the list differs
            from the list of the loaded weights.
    """
    if settings.answer_list:
        found, origin = AnswerVocabulary.load(Path(settings.answer_list)), f"task.answer_list={settings.answer_list}"
    elif training:
        mains = (answer for questions in training for answer in questions.main_answers())
        found = AnswerVocabulary.build(mains, settings.min_answer_occurrences)
        origin = f"the training answers that occur at least {settings.min_answer_occurrences} times"
    elif stored:
        found, origin = stored, where
    else:
        raise ConfigError(
            f"task.answer_list: {where} have no list of answers, so their outputs have no names. Set it to the list "
            f"that belongs to them, such as the {ANSWERS_FILE} of the run or the reference's answer2label.txt."
        )
    if len(found) != settings.num_answers:
        raise ConfigError(
            f"task.num_answers={settings.num_answers}, but {origin} give {len(found)} answers. Set it to {len(found)}, "
            "or use the files that the model was made for."
        )
    if stored and stored.digest() != found.digest():
        raise ConfigError(
            f"vqa: the answers of {where} are not those of {origin}: {_first_difference(stored, found)}. Outputs of "
            f"the head would mean other answers. Set task.answer_list to the list of the weights, or start from "
            "weights without this head (`beit3 export WEIGHTS OUT.safetensors --no-heads`)."
        )
    return found


def write_or_check_answers(folder: Path, answers: AnswerVocabulary) -> None:
    """Writes the answer list to a run's output folder. If the folder has checkpoints and a list, only compares the
    lists.

    Raises:
        ConfigError: if the folder has checkpoints of a run with another list, or cannot be written.
    """
    path = folder / ANSWERS_FILE
    checkpoints = folder / "checkpoints"
    if path.exists() and checkpoints.is_dir() and any(checkpoints.iterdir()):
        before = AnswerVocabulary.load(path)
        if before.digest() != answers.digest():
            raise ConfigError(
                f"vqa: the checkpoints in {checkpoints} belong to the answers in {path}, which differ from those of "
                f"this run: {_first_difference(before, answers)}. Put the training files back, set task.answer_list to "
                "that file, or use another training.output_dir."
            )
        return
    try:
        answers.save(path)
    except OSError as error:
        raise ConfigError(f"vqa: the answers cannot be written: {error}. Fix the folder or make room.") from error


def _first_difference(left: AnswerVocabulary, right: AnswerVocabulary) -> str:
    if len(left) != len(right):
        return f"{len(left)} and {len(right)} answers"
    pairs = enumerate(zip(left, right, strict=True))
    label, (first, second) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
    return f"answer {label} is {first!r} there and {second!r} here"
