"""Runs the micro-batches of a step through the model, with or without pipeline stages.

Gradients are accumulated here and not by DeepSpeed's engine, so the engine's `gradient_accumulation_steps` is always 1.
"""

# T packed rows of this rank, D hidden, K terms.

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.model import LossOutput, StepFeatures, StepLoss
from beit3_ds.parallel import Mesh, Message
from beit3_ds.pipeline import deepspeed_compat
from beit3_ds.pipeline.coupled_step import CoupledStep
from beit3_ds.pipeline.gradient_probe import GradientProbe
from beit3_ds.pipeline.schedule_1f1b import Action, schedule_1f1b
from beit3_ds.pipeline.stages import stage_layers
from beit3_ds.pipeline.stopwatch import Stopwatch
from beit3_ds.pipeline.tied import TiedWordEmbedding

Prepare = Callable[[PackedBatch], PackedBatch]
"""Function that moves a micro-batch to the device and adds missing targets (`RankTask.prepare`)."""


class Schedule:
    """Runs the micro-batches of a step through this stage's layers, in 1F1B order.

    Neighbouring stages exchange the residual stream of each micro-batch, (rows, hidden size), and the stream's
    gradient. With sequence parallelism, each tensor-parallel rank sends its own rows. A stage computes while it sends
    and receives.
    """

    def __init__(
        self, engine: DeepSpeedEngine, chunks: Sequence[range], mesh: Mesh, step_loss: StepLoss | None = None
    ) -> None:
        """Stores the arguments, and registers hooks on the gradients of the engine's model.

        The hooks find non-finite gradients (`GradientProbe`). In a pipeline with a tied word embedding, another hook on
        the first stage adds the gradient of the last stage's copy (`TiedWordEmbedding`).

        Args:
            engine: DeepSpeed engine of this stage's `StageModel`, with gradient accumulation 1.
            chunks: model chunks of all stages, in order (`stages.cut_layers`).
            mesh: mesh of all ranks.
            step_loss: function for loss terms that compare all samples of a step (`Task.step_loss`); None if there are
                none.
        """
        self.step_loss = step_loss
        self.engine, self.chunks, self.mesh = engine, tuple(chunks), mesh
        self.probe = GradientProbe()
        self.probe.watch(engine.module.parameters())  # before the hook that adds the tied gradient
        self.tied = TiedWordEmbedding(engine.module, mesh)
        self.probe.watch(self.tied.copies)
        self.model_chunks = stage_layers(chunks, mesh.pipeline.rank, mesh.pipeline.size)
        self._dtype, self._hidden_size = engine.module.stream_dtype, engine.module.stream_size
        self.sending: list[Message] = []
        self.own_work = Stopwatch(engine.device)
        """Measures those parts of a step that need no collective, to find slow ranks (`training.stragglers`)."""

    @property
    def forward_is_local(self) -> bool:
        """Returns whether the forward pass of a model chunk needs no other rank. This is the case if there is neither
        tensor parallelism nor ZeRO-3.
        """
        return self.mesh.tensor.size == 1 and self.engine.zero_optimization_stage() < 3

    def accumulate_gradients(
        self, micro_batches: Sequence[PackedBatch], loss_factors: Tensor, prepare: Prepare
    ) -> Tensor:
        """Runs the forward and backward passes of all micro-batches of one step. The caller updates the parameters.

        Data-parallel ranks reduce gradients after each micro-batch (ZeRO-2 and ZeRO-3) or after the last one (ZeRO-0
        and ZeRO-1). All ranks must have the same number of micro-batches.

        Args:
            micro_batches: micro-batches of the step, at least one; equal on all stages of a pipeline.
            loss_factors: factor on the sum of each loss term, (K,) float32. Each factor is inversely proportional to
                the term's count in the whole step, so the gradient does not depend on how the step is divided into
                micro-batches.
            prepare: function applied to each micro-batch before its first use.

        Returns:
            This rank's sum of each loss term, (K,) float32; zeros except on the last stage.
        """
        pipeline = self.mesh.pipeline
        actions = schedule_1f1b(len(micro_batches), pipeline.rank, pipeline.size, len(self.model_chunks))
        step = _Step(self, micro_batches, loss_factors, prepare, self._couple(micro_batches, loss_factors, prepare))
        deepspeed_compat.begin_step(self.engine, len(self.model_chunks))
        self.probe.begin_step()
        self.tied.synchronize()
        arriving = step.receive(actions[0])
        for action, following in zip(actions, [*actions[1:], None], strict=True):
            arrived = None if arriving is None else arriving.wait()
            arriving = None if following is None else step.receive(following)
            if action.forward:
                step.forward(action, arrived)
            else:
                step.backward(action, arrived, is_last=following is None)
        self._finish_sending()
        return step.sums

    def _couple(
        self, micro_batches: Sequence[PackedBatch], loss_factors: Tensor, prepare: Prepare
    ) -> CoupledStep | None:
        """Prepares a step whose loss compares all samples (`step_loss`). Returns None if there is no `step_loss`.

        With several micro-batches, a first forward pass computes the features of all micro-batches. The loss compares
        these features. The last stage then computes the loss's gradients with respect to the features. With one
        micro-batch, nothing is computed here, and `CoupledStep.total` computes the gradients later.
        """
        if self.step_loss is None:
            return None
        step = CoupledStep(self.step_loss, self.mesh, loss_factors, len(micro_batches))
        if len(micro_batches) > 1:
            outputs = [output for _, output in self.run_forward(micro_batches, loss_factors, prepare, "first pass")]
            if self.mesh.pipeline.is_last:
                step.differentiate(outputs)
        return step

    @torch.no_grad()
    def run_forward(
        self,
        batches: Iterable[PackedBatch],
        loss_factors: Tensor | None,
        prepare: Prepare,
        activity: str = "evaluation",
    ) -> Iterator[tuple[PackedBatch, Any]]:
        """Runs batches forward through all stages in evaluation mode.

        Args:
            batches: batches to run; equal on all stages of a pipeline.
            loss_factors: factor on the sum of each loss term, (K,) float32; None yields predictions instead of a loss.
            prepare: function applied to each batch before its use.
            activity: name of the phase that the watchdog reports.

        Yields:
            Each prepared batch with its output. On the last stage, the output is a `LossOutput`, or `StepFeatures` if
            the loss compares samples; without `loss_factors`, it is the predictions. On other stages, the output is
            None.
        """
        self.tied.synchronize()
        self.engine.eval()
        try:
            for batch in batches:
                self.mesh.activity.begin(activity)
                prepared = prepare(batch)
                yield prepared, self._run_forward(prepared, loss_factors)
        finally:
            self._finish_sending()
            self.engine.train()

    def _run_forward(self, batch: PackedBatch, loss_factors: Tensor | None) -> Any:
        output = None
        for chunk, layers in enumerate(self.model_chunks):
            arriving = self.receive(chunk, batch, forward=True)
            x_TD = None if arriving is None else arriving.wait()
            output = self.engine(batch, loss_factors, x_TD, layers)
            if not self.is_last(chunk):
                self.send(output, forward=True)
                output = None
        return output

    def is_first(self, chunk: int) -> bool:
        """Returns whether a model chunk of this stage starts with the embeddings."""
        return self.model_chunks[chunk].start == 0

    def is_last(self, chunk: int) -> bool:
        """Returns whether a model chunk of this stage ends with the head."""
        return self.model_chunks[chunk].stop == self.chunks[-1].stop

    def receive(self, chunk: int, batch: PackedBatch, *, forward: bool) -> Message | None:
        """Starts receiving the residual stream (T, D), or its gradient, for one pass through a model chunk.

        Args:
            chunk: index of the model chunk within the stage.
            batch: the packed micro-batch.
            forward: True for a forward pass, which receives the stream; False for a backward pass, which receives the
                gradient.

        Returns:
            The message to wait for, or None if the pass needs nothing from another stage.
        """
        if self.is_first(chunk) if forward else self.is_last(chunk):
            return None
        first, stop = self.mesh.tensor.own_row_range(batch.num_rows)
        x_TD = torch.empty(stop - first, self._hidden_size, dtype=self._dtype, device=self.engine.device)
        return self.mesh.pipeline.receive(x_TD, forward=forward)

    def send(self, x_TD: Tensor, *, forward: bool) -> None:
        """Starts sending the residual stream to the next stage (`forward`), or its gradient to the previous stage."""
        self.sending = [message for message in self.sending if not message.is_complete()]
        self.sending.append(self.mesh.pipeline.send(x_TD.detach().contiguous(), forward=forward))

    def _finish_sending(self) -> None:
        for message in self.sending:
            message.wait()
        self.sending.clear()


class _Step:
    """Runs this stage's passes of one step, and holds each micro-batch between its forward and backward pass."""

    def __init__(
        self,
        schedule: Schedule,
        micro_batches: Sequence[PackedBatch],
        loss_factors: Tensor,
        prepare: Prepare,
        coupled: CoupledStep | None,
    ) -> None:
        self.sums = torch.zeros_like(loss_factors) if coupled is None else coupled.sums
        self._coupled = coupled
        self._schedule, self._micro_batches, self._prepare = schedule, micro_batches, prepare
        self._loss_factors = loss_factors
        self._prepared: dict[int, PackedBatch] = {}
        self._pending: dict[tuple[int, int], _Pending] = {}

    def receive(self, action: Action) -> Message | None:
        batch = self._micro_batches[action.micro_batch]
        return self._schedule.receive(action.chunk, batch, forward=action.forward)

    def forward(self, action: Action, x_TD: Tensor | None) -> None:
        schedule, micro_batch = self._schedule, action.micro_batch
        schedule.mesh.activity.begin(f"forward of micro-batch {micro_batch}")
        if micro_batch not in self._prepared:
            with schedule.own_work.running():
                self._prepared[micro_batch] = self._prepare(self._micro_batches[micro_batch])
        if x_TD is not None:
            x_TD.requires_grad_()
        layers = schedule.model_chunks[action.chunk]
        with schedule.own_work.running() if schedule.forward_is_local else contextlib.nullcontext():
            output = schedule.engine(self._prepared[micro_batch], self._loss_factors, x_TD, layers)
        if action.chunk == len(schedule.model_chunks) - 1:
            del self._prepared[micro_batch]  # no other chunk of this stage needs it
        gradient: list[Tensor] = []
        if isinstance(output, LossOutput):
            self.sums += output.sums
            # A non-finite loss may have finite gradients. This makes them NaN, so that all ranks see it in the norm.
            loss = output.total * (1 + 0 * output.total.detach())
        elif isinstance(output, StepFeatures):
            assert self._coupled is not None, "a head that returns `StepFeatures` needs `Task.step_loss`"
            loss = self._coupled.total(micro_batch, output)
        else:
            loss = _TakeGradient.apply(output, gradient)
            schedule.send(output, forward=True)
        self._pending[micro_batch, action.chunk] = _Pending(x_TD, loss, gradient)

    def backward(self, action: Action, gradient_TD: Tensor | None, *, is_last: bool) -> None:
        schedule = self._schedule
        pending = self._pending.pop((action.micro_batch, action.chunk))
        if gradient_TD is not None:
            pending.gradient.append(gradient_TD)
        schedule.mesh.activity.begin(f"backward of micro-batch {action.micro_batch}")
        schedule.tied.before_backward(is_last=is_last)
        schedule.probe.begin_backward(action.micro_batch)
        deepspeed_compat.backward(schedule.engine, pending.loss, is_last=is_last)
        if pending.x_TD is not None:
            assert pending.x_TD.grad is not None
            schedule.send(pending.x_TD.grad, forward=False)
        schedule.sending += schedule.tied.after_backward(is_last=is_last)


class _Pending:
    """Holds what a backward pass needs from its forward pass."""

    def __init__(self, x_TD: Tensor | None, loss: Tensor, gradient: list[Tensor]) -> None:
        self.x_TD, self.loss, self.gradient = x_TD, loss, gradient


class _TakeGradient(torch.autograd.Function):
    """Returns a scalar whose backward pass yields the gradient that the next stage has sent."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return x_TD.new_zeros(())

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.pop(), None
