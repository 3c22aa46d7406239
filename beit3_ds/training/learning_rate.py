"""Computes the learning rate of each step: a linear warmup, then a cosine or a straight line."""

import math

from beit3_ds.config import TrainingConfig
from beit3_ds.config.training import LearningRateDecay


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Returns the run's learning rate in step `step`, counted from 0 (paper, section 2.3)."""
    return warmup_then_decay(
        step,
        peak=config.learning_rate,
        minimum=config.min_learning_rate,
        warmup_steps=config.warmup_steps,
        total_steps=config.total_steps,
        decay=config.learning_rate_decay,
    )


def warmup_then_decay(
    step: int,
    *,
    peak: float,
    minimum: float,
    warmup_steps: int,
    total_steps: int,
    decay: LearningRateDecay = "cosine",
) -> float:
    """Returns the learning rate of one step: a linear warmup, then half a cosine or a straight line.

    The first warmup step has rate peak / warmup_steps, the last warmup step has the peak, and the last step of the
    schedule has the minimum. If the warmup lasts for the whole schedule, the last step has the peak instead. BEiT v2's
    schedule is shifted by one step: its first step has rate 0, and its last step does not quite reach the minimum.

    Args:
        step: index of the step, from 0.
        peak: largest learning rate.
        minimum: learning rate at the end of the decay and in later steps.
        warmup_steps: number of steps of the linear warmup; with 0, the decay starts at once, and the first step is
            already below the peak.
        total_steps: number of steps of the schedule.
        decay: curve after the warmup.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step + 1 - warmup_steps) / max(1, total_steps - warmup_steps))
    remaining = 1 - progress if decay == "poly" else 0.5 * (1 + math.cos(math.pi * progress))
    return minimum + (peak - minimum) * remaining
