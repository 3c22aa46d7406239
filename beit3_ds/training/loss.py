"""Computes factors of the loss terms, so that ranks and micro-batches do not change the loss of a step."""

# K terms of the task.

from collections.abc import Sequence

import torch
from torch import Tensor

from beit3_ds.batch import StepBatch
from beit3_ds.tasks import Term


def count_terms(step_batch: StepBatch) -> Tensor:
    """Returns each term's count of predictions in this rank's share of a step, (terms,) int64; runs no model."""
    counts = torch.tensor([batch.term_counts for batch in step_batch.micro_batches], dtype=torch.int64)
    return counts.sum(0)


def build_loss_factors(counts: Tensor, terms: Sequence[Term], data_parallel_size: int) -> Tensor:
    """Returns the factors, (K,) float32, by which the sums of the K terms are multiplied in the loss.

    Each term is a mean over the whole step on all ranks; a term with count 0 is 0. DeepSpeed averages gradients over
    the data-parallel ranks; the factors undo this average.

    Args:
        counts: count of each term over all ranks, (K,) int64.
        terms: loss terms of the task, with their weights.
        data_parallel_size: number of ranks that the engine averages over.
    """
    weight = torch.tensor([term.weight for term in terms], dtype=torch.float64)
    factors = torch.where(counts > 0, weight * data_parallel_size / counts.clamp(min=1), 0.0)
    return factors.float()
