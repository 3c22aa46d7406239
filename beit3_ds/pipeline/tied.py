"""Synchronizes the tied word table between the first and the last stage of a pipeline."""

import deepspeed
import torch
from torch import Tensor

from beit3_ds.model import StageModel
from beit3_ds.parallel import Mesh, Message


class TiedWordEmbedding:
    """Keeps the last stage's copy of the word table equal to the first stage's parameter.

    The first stage trains and saves the table. The last stage's head has a copy that DeepSpeed does not manage. The
    last stage sums the copy's gradient in float32 over the micro-batches. It sends this sum to the first stage, which
    adds it to the table's gradient in the last backward pass of the step. At the start of each step and each
    evaluation, the first stage sends the table to the last stage; each tensor-parallel rank sends its own part. Without
    a pipeline, nothing is sent.
    """

    def __init__(self, model: StageModel, mesh: Mesh) -> None:
        """Finds the word table, or the head's copy of it, on this stage."""
        self._pipeline = mesh.pipeline
        self._owned = model.tied_embedding if mesh.pipeline.size > 1 else None
        table = model.tied_word_layer
        self._copy = table.weight if mesh.pipeline.size > 1 and table is not None else None
        self._arrived: Tensor | None = None
        if self._owned is not None:
            # Under ZeRO-3 the parameter has no elements while it is partitioned.
            self._shape = getattr(self._owned, "ds_shape", self._owned.shape)
            self._owned.register_hook(self._add_arrived)
        if self._copy is not None:
            self._copy.requires_grad_()
            self._sum = torch.zeros_like(self._copy, dtype=torch.float32, requires_grad=False)

    @property
    def copies(self) -> list[Tensor]:
        """Returns a list with the last stage's copy of the table; empty on other stages."""
        return [] if self._copy is None else [self._copy]

    def synchronize(self) -> None:
        """Sends the word table from the first to the last stage.

        Under ZeRO-3, data-parallel ranks gather the table first.
        """
        if self._owned is not None:
            with deepspeed.zero.GatheredParameters([self._owned]), torch.no_grad():
                # Travels backward around the ring, after the last gradient of the previous step.
                self._pipeline.send(self._owned.detach().clone(), forward=False).wait()
        if self._copy is not None:
            with torch.no_grad():
                self._copy.copy_(self._pipeline.receive(self._copy.detach().clone(), forward=False).wait())
            self._sum.zero_()

    def before_backward(self, *, is_last: bool) -> None:
        """On the first stage, receives a gradient before the step's last backward pass: that of the last stage's copy
        of the word table.

        Call this method before each backward pass of a step. All other calls do nothing.

        Args:
            is_last: whether the next backward pass is this stage's last one of the step.
        """
        if is_last and self._owned is not None:
            # Travels forward around the ring, after the last activation of the step.
            gradient = torch.empty(self._shape, dtype=torch.float32, device=self._owned.device)
            self._arrived = self._pipeline.receive(gradient, forward=True).wait()

    def after_backward(self, *, is_last: bool) -> list[Message]:
        """On the last stage, adds the gradient of the copied word table to a sum over the step's micro-batches.

        If `is_last` is True, the last stage also starts sending the sum to the first stage. Other stages, and a run
        without a pipeline, do nothing. Call this method after each backward pass of a step.

        Args:
            is_last: whether the backward pass was this stage's last one of the step.

        Returns:
            The message with the sum if the sum is being sent, else an empty list.
        """
        if self._copy is None:
            return []
        if self._copy.grad is not None:  # None after a model chunk without the head
            self._sum += self._copy.grad
            self._copy.grad = None
        return [self._pipeline.send(self._sum, forward=True)] if is_last else []

    def _add_arrived(self, gradient: Tensor) -> Tensor:
        arrived, self._arrived = self._arrived, None
        return gradient if arrived is None else gradient + arrived.to(gradient.dtype)
