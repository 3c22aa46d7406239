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
    """Number of answers in the list, and of outputs of the head. VQAv2's training and validation answers give 3,129.
    If the run's list has another length, the run ends at its start with an error that names this length."""
    min_answer_occurrences: Positive = MIN_OCCURRENCES
    """An answer is listed if it is the main answer to at least this number of training questions (reference: 9)."""
    answer_list: PathString | None = None
    """File with a list of answers, such as the `answers.jsonl` of another run or the reference's `answer2label.txt`.
    With None, training builds the list from the training answers, and an evaluation uses the list stored with the
    weights."""
    page_samples: Annotated[int, Range(0, 10_000)] = 40
    """Number of questions on the page that an evaluation writes."""
