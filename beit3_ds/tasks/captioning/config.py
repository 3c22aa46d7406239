"""Defines the keys of the "task" section for captioning."""

from dataclasses import dataclass
from typing import Annotated, Literal

from beit3_ds.config.numbers import Count, Decay, Positive, Range


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig:
    """Configures masked fine-tuning and generation of captions; the defaults are the reference's recipe."""

    mask_ratio: Annotated[float, Range(0, 1, above=True)] = 0.7
    """Share of the tokens of a caption that are predicted in training; its end is a token like any other."""
    label_smoothing: Decay = 0.1
    """Probability that the labels give to all words but the right one together."""
    dropped_share: Decay = 0.2
    """Share of the tokens of a step, those with the largest losses, that do not count in the loss, because some
    captions do not fit their image. With a value above 0, a step of several micro-batches runs forward twice: the first
    pass finds the losses of all tokens of the step."""
    drop_after_steps: Count = 12_000
    """Steps before tokens are dropped."""
    generation: Literal["at_end", "always", "never"] = "at_end"
    """Evaluations that write captions: those that write result files (the last one of a run, and `beit3 evaluate`), all
    or none. Others report how many masked words are found."""
    num_beams: Annotated[int, Range(1, 64)] = 3
    """Unfinished captions that the search keeps per image; 1 is greedy search."""
    length_penalty: Annotated[float, Range(0, 10)] = 0.6
    """Exponent of the length by which the log-probability of a caption is divided."""
    max_length: Annotated[int, Range(4, 2**18)] = 20
    """Maximum ids of a generated caption, with BOS, a placeholder and EOS."""
    official_scores: bool = True
    """Whether captions are scored with pycocoevalcap where it is installed; METEOR takes a minute to start. The shares
    of captions that end by themselves and that equal a reference are always given."""
    shown_captions: Positive = 60
    """Images that the page of an evaluation shows."""
