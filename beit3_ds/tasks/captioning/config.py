"""Defines the keys of the "task" section for captioning."""

from dataclasses import dataclass
from typing import Annotated, Literal

from beit3_ds.config.numbers import Count, Decay, Positive, Range


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig:
    """Configures masked fine-tuning and caption generation; the defaults follow Microsoft's BEiT-3 code."""

    mask_ratio: Annotated[float, Range(0, 1, above=True)] = 0.7
    """Fraction of a caption's tokens that are masked and predicted in training. The EOS token at the end counts as a
    token of the caption and may be masked."""
    label_smoothing: Decay = 0.1
    """Total probability of all wrong words in a smoothed label."""
    dropped_share: Decay = 0.2
    """Share of a step's masked tokens to leave out of the loss. The tokens with the largest losses are left out,
    because some captions do not fit their images. With a value above 0, a step of several micro-batches runs forward
    twice; the first pass computes the losses of all tokens of the step."""
    drop_after_steps: Count = 12_000
    """Number of steps after which `dropped_share` takes effect. Earlier steps use all masked tokens."""
    generation: Literal["at_end", "always", "never"] = "at_end"
    """Which evaluations generate captions. With `at_end`, `beit3 evaluate` and each evaluation that may be the last of
    a run do. Evaluations without generation only predict masked words."""
    num_beams: Annotated[int, Range(1, 64)] = 3
    """Number of beams per image in the beam search; 1 is greedy search."""
    length_penalty: Annotated[float, Range(0, 10)] = 0.6
    """Exponent p of the length penalty: the beam search divides a caption's log-probability by length ** p."""
    max_length: Annotated[int, Range(4, 2**18)] = 20
    """Maximum number of tokens of a generated caption, counting BOS, EOS and the mask token. So the text of a caption
    has at most `max_length` - 3 tokens."""
    official_scores: bool = True
    """Whether to compute the official metrics with pycocoevalcap, if it is installed; METEOR takes a minute to start.
    Other metrics of generated captions are always computed: the share of captions that end before the length limit, and
    the share that equal a reference caption."""
    shown_captions: Positive = 60
    """Number of images on the result page of an evaluation."""
