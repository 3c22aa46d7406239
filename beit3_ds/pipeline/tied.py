"""The word table that the first and the last stage share where word embeddings are tied."""

import deepspeed
import torch
from torch import Tensor

from beit3_ds.model import TaskModel
from beit3_ds.parallel import Mesh, Message


class TiedWordEmbedding:
    """Keeps the last stage's copy of the word table equal to the first stage's parameter.

    The first stage owns the table: there it is trained, divided by ZeRO, clipped and saved. The head of the last
    stage has a copy that DeepSpeed does not know. Its gradient, summed over the step's micro-batches in float32, is
    sent to the first stage before that one's last backward pass and added there to the table's own, so ZeRO reduces the
    sum under any stage. Each step and evaluation begins by sending the table, this rank's V * D elements. Without a
    pipeline the head holds the parameter itself and nothing is to be done.
    """

    def __init__(self, model: TaskModel, mesh: Mesh) -> None:
        """Finds the table or its copy among the parts of this stage."""
        self._pipeline = mesh.pipeline
        tied = model.config.tie_word_embeddings and mesh.pipeline.size > 1
        self._owned = model.embeddings.word.weight if tied and model.embeddings is not None else None
        table = model.tied_table
        self._copy = table.weight if mesh.pipeline.size > 1 and table is not None else None
        self._arrived: Tensor | None = None
        if self._owned is not None:
            # Under ZeRO-3 the parameter itself has no elements most of the time.
            self._shape = getattr(self._owned, "ds_shape", self._owned.shape)
            self._owned.register_hook(self._add_arrived)
        if self._copy is not None:
            self._copy.requires_grad_()
            self._sum = torch.zeros_like(self._copy, dtype=torch.float32, requires_grad=False)

    @property
    def copies(self) -> list[Tensor]:
        """The last stage's copy, which is none of its parameters."""
        return [] if self._copy is None else [self._copy]

    def synchronize(self) -> None:
        """Sends the table from the first to the last stage; the data-parallel ranks of the first gather it."""
        if self._owned is not None:
            with deepspeed.zero.GatheredParameters([self._owned]), torch.no_grad():
                # Backwards around the ring, after the last gradient of the step before.
                self._pipeline.send(self._owned.detach().clone(), forward=False).wait()
        if self._copy is not None:
            with torch.no_grad():
                self._copy.copy_(self._pipeline.receive(self._copy.detach().clone(), forward=False).wait())
            self._sum.zero_()

    def before_backward(self, *, is_last: bool) -> None:
        """To be called before each backward pass of a step."""
        if is_last and self._owned is not None:
            # Forwards around the ring, after the last activation of the step.
            gradient = torch.empty(self._shape, dtype=torch.float32, device=self._owned.device)
            self._arrived = self._pipeline.receive(gradient, forward=True).wait()

    def after_backward(self, *, is_last: bool) -> list[Message]:
        """To be called after each backward pass of a step; returns what it has begun to send."""
        if self._copy is None:
            return []
        if self._copy.grad is not None:  # not after a run of layers that ends before the heads
            self._sum += self._copy.grad
            self._copy.grad = None
        return [self._pipeline.send(self._sum, forward=True)] if is_last else []

    def _add_arrived(self, gradient: Tensor) -> Tensor:
        arrived, self._arrived = self._arrived, None
        return gradient if arrived is None else gradient + arrived.to(gradient.dtype)
