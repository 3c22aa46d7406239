"""Defines the keys of the "task" section for visual question answering."""

from dataclasses import dataclass
from typing import Annotated

from beit3_ds.config.numbers import Positive, Range
from beit3_ds.config.strict import PathString
from beit3_ds.tasks.vqa.answers import MIN_OCCURRENCES


@dataclass(frozen=True, kw_only=True)
class VqaConfig:
    """Configures visual question answering: the list of possible answers, and the result page."""

    num_answers: Annotated[int, Range(2, 2**20)] = 3129
    """Number of answers in the answer list; VQAv2's training and validation answers give 3,129. If the list has another
    length, the run stops at startup with an error that names the length."""
    min_answer_occurrences: Positive = MIN_OCCURRENCES
    """An answer is listed if it is the main answer to at least this number of training questions (Microsoft's BEiT-3
    code: 9)."""
    answer_list: PathString | None = None
    """File with an answer list, such as the `answers.jsonl` of another run or `answer2label.txt` of Microsoft's BEiT-3
    code. With None, training builds the list from the training answers, and an evaluation uses the list stored with the
    weights."""
    page_samples: Annotated[int, Range(0, 10_000)] = 40
    """Number of questions on the result page of an evaluation."""
