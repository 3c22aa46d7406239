"""Defines the keys of the "task" section for questions about images."""

from dataclasses import dataclass
from typing import Annotated

from beit3_ds.config.numbers import Positive, Range
from beit3_ds.config.strict import PathString
from beit3_ds.tasks.vqa.answers import MIN_OCCURRENCES


@dataclass(frozen=True, kw_only=True)
class VqaConfig:
    """Configures the answers among which the model chooses."""

    num_answers: Annotated[int, Range(2, 2**20)] = 3129
    """Number of answers. It must be that of the list, because the head has an output per answer: VQAv2's training and
    validation answers give 3,129. With other files the error at the start names the right number."""
    min_answer_occurrences: Positive = MIN_OCCURRENCES
    """Training questions that an answer must be the main answer of to be in the list (reference: 9)."""
    answer_list: PathString | None = None
    """File with a list of answers, such as the `answers.jsonl` of another run or the reference's `answer2label.txt`.
    None makes the list of the training answers; weights that are evaluated bring their own."""
    page_samples: Annotated[int, Range(0, 10_000)] = 40
    """Questions that the page of an evaluation shows."""
