"""Runs the micro-batches of a step through the model, with or without pipeline stages.

DeepSpeed's engine therefore never accumulates gradients itself: its `gradient_accumulation_steps` is always 1.
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
"""Function that moves a micro-batch to the device and adds missing targets for the head (`RankTask.prepare`)."""


class Schedule:
    """Runs the micro-batches of a step through this stage's layers, in 1F1B order.

    Neighbouring stages exchange the stream of each micro-batch, (rows, hidden size), and its gradient. With sequence
    parallelism each tensor-parallel rank sends its own rows. A stage computes while it sends and receives.
    """

    def __init__(
        self, engine: DeepSpeedEngine, chunks: Sequence[range], mesh: Mesh, step_loss: StepLoss | None = None
    ) -> None:
        """Registers the gradient probe and the tied word table on the engine's model.

        Args:
            engine: engine of this stage's `StageModel`, with gradient accumulation 1.
            chunks: model chunks of all stages, in order (`stages.cut_layers`).
            mesh: the ranks.
            step_loss: sums of terms that compare all samples of a step (`Task.step_loss`); None if no term does.
        """
        self.step_loss = step_loss
        self.engine, self.chunks, self.mesh = engine, tuple(chunks), mesh
        self.probe = GradientProbe()
        self.probe.watch(engine.module.parameters())  # before the tied table's gradient from another stage is added
        self.tied = TiedWordEmbedding(engine.module, mesh)
        self.probe.watch(self.tied.copies)
        self.model_chunks = stage_layers(chunks, mesh.pipeline.rank, mesh.pipeline.size)
        self._dtype, self._hidden_size = engine.module.stream_dtype, engine.module.stream_size
        self.sending: list[Message] = []
        self.own_work = Stopwatch(engine.device)
        """Measures the parts of a step without collectives (`training.stragglers`)."""

    @property
    def forward_is_own(self) -> bool:
        """Returns whether a forward pass needs no other rank, which is so without tensor parallelism and ZeRO-3."""
        return self.mesh.tensor.size == 1 and self.engine.zero_optimization_stage() < 3

    def accumulate_gradients(
        self, micro_batches: Sequence[PackedBatch], loss_factors: Tensor, prepare: Prepare
    ) -> Tensor:
        """Runs forward and backward of every micro-batch of one optimizer step; the caller does the update.

        Data-parallel ranks reduce gradients after every micro-batch (ZeRO-2 and 3) or after the last one (ZeRO-0 and
        1). Every rank must have the same number of micro-batches.

        Args:
            micro_batches: at least one; the same on all stages of a pipeline.
            loss_factors: factor of the sum of each term, (K,) float32. The factors contain the counts of the whole
                step, so the gradients of micro-batches add up however the step is cut.
            prepare: function applied to each micro-batch before its first use.

        Returns:
            This rank's sum of each of the task's terms, (K,) float32; zeros on stages before the last.
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
        """Runs the first pass of a step with terms that compare all its samples; returns None without such terms.

        A single micro-batch needs no first pass, which would keep ZeRO-3 from prefetching.
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
        """Runs batches forward through all stages, in evaluation mode.

        Args:
            batches: batches, the same on all stages of a pipeline.
            loss_factors: factor of the sum of each term, (K,) float32; None yields predictions.
            prepare: function applied to each batch first.
            activity: name of the phase for `Mesh.activity`, which the watchdog reports.

        Yields:
            Each prepared batch, with its `LossOutput`, `StepFeatures` or predictions on the last stage and None
            elsewhere.
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
        """Returns whether a model chunk of this stage begins with the embeddings."""
        return self.model_chunks[chunk].start == 0

    def is_last(self, chunk: int) -> bool:
        """Returns whether a model chunk of this stage ends with the head."""
        return self.model_chunks[chunk].stop == self.chunks[-1].stop

    def receive(self, chunk: int, batch: PackedBatch, *, forward: bool) -> Message | None:
        """Starts receiving what a pass through a chunk needs from another stage: the stream (T, D), or its gradient.

        Returns:
            The message to wait for; None if the pass needs nothing from another stage.
        """
        if self.is_first(chunk) if forward else self.is_last(chunk):
            return None
        first, stop = self.mesh.tensor.own_row_range(batch.num_rows)
        x_TD = torch.empty(stop - first, self._hidden_size, dtype=self._dtype, device=self.engine.device)
        return self.mesh.pipeline.receive(x_TD, forward=forward)

    def send(self, x_TD: Tensor, *, forward: bool) -> None:
        """Starts sending the stream to the next stage, or its gradient to the previous one."""
        self.sending = [message for message in self.sending if not message.has_left()]
        self.sending.append(self.mesh.pipeline.send(x_TD.detach().contiguous(), forward=forward))

    def _finish_sending(self) -> None:
        for message in self.sending:
            message.wait()
        self.sending.clear()


class _Step:
    """Holds the micro-batches of one step that are in flight on this stage."""

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
        schedule, number = self._schedule, action.micro_batch
        schedule.mesh.activity.begin(f"forward of micro-batch {number}")
        if number not in self._prepared:
            with schedule.own_work.running():
                self._prepared[number] = self._prepare(self._micro_batches[number])
        if x_TD is not None:
            x_TD.requires_grad_()
        layers = schedule.model_chunks[action.chunk]
        with schedule.own_work.running() if schedule.forward_is_own else contextlib.nullcontext():
            output = schedule.engine(self._prepared[number], self._loss_factors, x_TD, layers)
        if action.chunk == len(schedule.model_chunks) - 1:
            del self._prepared[number]  # no other chunk of this stage needs it
        gradient: list[Tensor] = []
        if isinstance(output, LossOutput):
            self.sums += output.sums
            # A non-finite loss may have finite gradients. This makes them NaN, so that all ranks see it in the norm.
            loss = output.total * (1 + 0 * output.total.detach())
        elif isinstance(output, StepFeatures):
            assert self._coupled is not None, "a head that returns `StepFeatures` needs `Task.step_loss`"
            loss = self._coupled.total(number, output)
        else:
            loss = _TakeGradient.apply(output, gradient)
            schedule.send(output, forward=True)
        self._pending[number, action.chunk] = _Pending(x_TD, loss, gradient)

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
    """Holds what the backward pass needs from its forward pass."""

    def __init__(self, x_TD: Tensor | None, loss: Tensor, gradient: list[Tensor]) -> None:
        self.x_TD, self.loss, self.gradient = x_TD, loss, gradient


class _TakeGradient(torch.autograd.Function):
    """Returns a scalar loss whose backward pass uses the gradient that the next stage has sent."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return x_TD.new_zeros(())

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.pop(), None
