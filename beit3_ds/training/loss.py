"""Computes loss factors, so that a step's loss does not depend on how its samples are divided among ranks and
micro-batches.
"""

# K terms of the task.

from collections.abc import Sequence

import torch
from torch import Tensor

from beit3_ds.batch import StepBatch
from beit3_ds.tasks import Term


def count_terms(step_batch: StepBatch) -> Tensor:
    """Returns the number of predictions per loss term in this rank's share of a step, (terms,) int64, without a forward
    pass.
    """
    counts = torch.tensor([batch.term_counts for batch in step_batch.micro_batches], dtype=torch.int64)
    return counts.sum(0)


def build_loss_factors(counts: Tensor, terms: Sequence[Term], data_parallel_size: int) -> Tensor:
    """Returns the factor on the sum of each loss term, (K,) float32.

    Each term of the loss is a mean over the whole step on all ranks; a term with count 0 is 0. The factors include the
    data-parallel size, because DeepSpeed averages gradients over data-parallel ranks.

    Args:
        counts: count of each term over all ranks, (K,) int64.
        terms: loss terms of the task, with their weights.
        data_parallel_size: number of data-parallel ranks.
    """
    weight = torch.tensor([term.weight for term in terms], dtype=torch.float64)
    factors = torch.where(counts > 0, weight * data_parallel_size / counts.clamp(min=1), 0.0)
    return factors.float()
