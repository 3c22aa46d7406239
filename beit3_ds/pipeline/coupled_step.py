"""Computes the gradients of a loss that compares all samples of a step, such as a contrastive loss.

Follows GradCache (Gao et al., 2021, arXiv:2101.06983). A first pass without gradients computes the features of all
micro-batches. The loss of the whole step is differentiated with respect to the features. A second pass backpropagates
the inner product of features and these gradients for each micro-batch. So a step needs the memory of one micro-batch
and of the features.
"""

# n rows of this rank, N rows of all data-parallel ranks, K terms.

from collections.abc import Sequence

import torch
from torch import Tensor

from beit3_ds.model import StepFeatures, StepLoss
from beit3_ds.parallel import Mesh


class CoupledStep:
    """Computes loss terms over a whole step, and their gradients with respect to the features, on the last stage.

    Each data-parallel rank gathers all features and computes the whole loss.
    """

    def __init__(self, step_loss: StepLoss, mesh: Mesh, loss_factors: Tensor, num_micro_batches: int) -> None:
        """Stores the arguments. Computes and sends nothing.

        Args:
            step_loss: function that computes the sum of each loss term over a whole step.
            mesh: mesh of all ranks.
            loss_factors: factor on the sum of each term, (K,) float32 (`training.loss.build_loss_factors`).
            num_micro_batches: number of micro-batches per rank.
        """
        self._step_loss, self._mesh = step_loss, mesh
        self._loss_factors, self._num_micro_batches = loss_factors, num_micro_batches
        self._gradients: list[StepFeatures] = []
        self.sums = torch.zeros_like(loss_factors)
        """Sum of each loss term over the whole step. Only the first data-parallel rank holds the sums; the other ranks
        hold zeros."""

    def differentiate(self, micro_batches: Sequence[StepFeatures]) -> None:
        """Computes the loss terms and their gradients. All data-parallel ranks must call this method.

        Each rank sends its features to all data-parallel ranks.

        Args:
            micro_batches: features of each of this rank's micro-batches; may be attached to an autograd graph.
        """
        whole, own = gather_features(micro_batches, self._mesh)
        with torch.enable_grad():
            leaves = [x.requires_grad_() for part in whole for x in part.values() if x.is_floating_point()]
            sums = self._step_loss(whole)
            # A non-finite loss may have finite gradients. This makes them NaN, so that all ranks see it in the norm.
            loss = (sums * self._loss_factors * (1 + 0 * sums.detach())).sum()
            gradients = iter(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        self.sums += _share(sums.detach(), self._mesh)
        rows = {name: next(gradients) for name, x in whole.rows.items() if x.is_floating_point()}
        # The factors contain the data-parallel size, because the engine averages gradients. Every rank has the whole
        # gradient of shared values, and each of its micro-batches contributes an equal part of that gradient.
        parts = self._mesh.data_parallel_size * self._num_micro_batches
        shared = {name: next(gradients) / parts for name in whole.shared}
        split = {name: _split(rows[name][own[name]], [f.rows[name] for f in micro_batches]) for name in rows}
        self._gradients = [
            StepFeatures({name: pieces[micro_batch] for name, pieces in split.items()}, shared)
            for micro_batch in range(len(micro_batches))
        ]

    def total(self, micro_batch: int, features: StepFeatures) -> Tensor:
        """Returns a scalar whose backward pass gives this micro-batch's part of the gradients of the step's loss.

        The scalar is the inner product of the features and the loss's gradients with respect to the features. If the
        step has only one micro-batch, this method first calls `differentiate` to compute these gradients.

        Args:
            micro_batch: index of the micro-batch, from 0.
            features: features of the micro-batch, attached to an autograd graph.
        """
        if not self._gradients:
            assert self._num_micro_batches == 1, "the first pass must come before"
            self.differentiate([features])
        products = [
            (part[name].float() * gradient.float()).sum()
            for part, gradients in zip(features, self._gradients[micro_batch], strict=True)
            for name, gradient in gradients.items()
        ]
        return torch.stack(products).sum()


def sum_terms(step_loss: StepLoss, micro_batches: Sequence[StepFeatures], mesh: Mesh) -> Tensor:
    """Sums each loss term over the features of all data-parallel ranks.

    This function gathers the features. All data-parallel ranks of the last stage must call it.

    Args:
        step_loss: function that computes the sum of each loss term over a whole step.
        micro_batches: features of each of this rank's micro-batches; at least one micro-batch.
        mesh: mesh of all ranks.

    Returns:
        The sums on the first data-parallel rank, zeros on the other ranks, (terms,).
    """
    whole, _ = gather_features(micro_batches, mesh)
    return _share(step_loss(whole), mesh)


def gather_features(micro_batches: Sequence[StepFeatures], mesh: Mesh) -> tuple[StepFeatures, dict[str, slice]]:
    """Gathers the features of all data-parallel ranks, detached from the autograd graph.

    Ranks may have different numbers of rows. All data-parallel ranks must call this function.

    Returns:
        Features of all ranks, in rank order, and this rank's slice of the rows of each tensor.
    """
    first = micro_batches[0]
    joined = {name: torch.cat([features.rows[name].detach() for features in micro_batches]) for name in first.rows}
    counts = mesh.data_host.gather([len(x) for x in joined.values()])
    rows, own = {}, {}
    for place, (name, x) in enumerate(joined.items()):
        lengths = [int(rank[place]) for rank in counts]
        start = sum(lengths[: mesh.data_parallel_rank])
        rows[name], own[name] = mesh.gather_rows_over_data(x, lengths), slice(start, start + len(x))
    return StepFeatures(rows, {name: x.detach().clone() for name, x in first.shared.items()}), own


def _share(sums: Tensor, mesh: Mesh) -> Tensor:
    return sums if mesh.data_parallel_rank == 0 else torch.zeros_like(sums)


def _split(x: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return x.split([len(piece) for piece in like])
