"""One loss, however the step is cut into ranks and micro-batches."""

import torch
from torch import Tensor

from beit3_ds.batch import LOSS_TERMS, StepBatch
from beit3_ds.config import LossWeights


def count_masked(step_batch: StepBatch) -> Tensor:
    """Masked positions of each of `LOSS_TERMS` in this rank's share of a step, (4,) int64, known before any forward."""
    counts = torch.tensor([batch.num_masked for batch in step_batch.micro_batches], dtype=torch.int64)
    return counts.sum(0)


def build_loss_factors(counts: Tensor, weights: LossWeights, data_parallel_size: int) -> Tensor:
    """What each term's sum of cross entropies is multiplied by, (4,) float32.

    Each term is a mean over all its masked positions of the whole step, on all ranks; a term without positions is 0.
    DeepSpeed averages gradients over the data-parallel ranks, so the factors undo that average.

    Args:
        counts: masked positions of each term over all ranks, (4,) int64.
        weights: the terms' weights.
        data_parallel_size: ranks that the engine averages over.
    """
    weight = torch.tensor([getattr(weights, term) for term in LOSS_TERMS], dtype=torch.float64)
    factors = torch.where(counts > 0, weight * data_parallel_size / counts.clamp(min=1), 0.0)
    return factors.float()
