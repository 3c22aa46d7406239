"""The one schedule that owns micro-batches; the engine's own accumulation is always 1."""

from collections.abc import Iterable, Iterator

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from beit3_ds.batch import LOSS_TERMS, PackedBatch


def accumulate_gradients(engine: DeepSpeedEngine, micro_batches: Iterable[PackedBatch], loss_factors: Tensor) -> Tensor:
    """Runs forward and backward of every micro-batch of one optimizer step; `engine.step()` is left to the caller.

    Gradients are reduced over the data-parallel ranks as the ZeRO stage does it: after every micro-batch (2 and 3) or
    with the last one (0 and 1). Every rank must bring the same number of micro-batches.

    Args:
        engine: with gradient accumulation 1.
        micro_batches: prepared batches, with visual targets, on the engine's device; at least one.
        loss_factors: what each loss term's sum is multiplied by, (4,) float32. They hold the counts of the whole step,
            so gradients of micro-batches simply add up, however the step is cut.

    Returns:
        This rank's sum of cross entropies of each of `batch.LOSS_TERMS`, (4,) float32.
    """
    sums = torch.zeros(len(LOSS_TERMS), device=loss_factors.device)
    for batch, is_last in _mark_last(micro_batches):
        engine.set_gradient_accumulation_boundary(is_last)
        output = engine(batch, loss_factors)
        engine.backward(output.total)
        sums += output.sums
    return sums


def _mark_last(micro_batches: Iterable[PackedBatch]) -> Iterator[tuple[PackedBatch, bool]]:
    """Yields each micro-batch with whether it is the last, preparing no more than one ahead."""
    iterator = iter(micro_batches)
    current = next(iterator)
    for following in iterator:
        yield current, False
        current = following
    yield current, True
