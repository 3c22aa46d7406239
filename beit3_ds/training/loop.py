"""The training loop."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from beit3_ds.batch import PackedBatch, StepBatch
from beit3_ds.checkpoint import CheckpointStore
from beit3_ds.config import RunConfig
from beit3_ds.parallel import Mesh
from beit3_ds.pipeline.schedule import Schedule
from beit3_ds.tokenizers.visual import VisualTokenizer
from beit3_ds.training.engine import apply_update
from beit3_ds.training.evaluation import evaluate
from beit3_ds.training.history import History
from beit3_ds.training.learning_rate import learning_rate
from beit3_ds.training.loss import BrokenRecordBudget, build_loss_factors
from beit3_ds.training.progress import Progress, format_evaluation, format_line
from beit3_ds.training.targets import prepare_batch


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient norm is not a number; going on would destroy the weights."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything the loop works with, built by `pretrain`."""

    config: RunConfig
    schedule: Schedule
    mesh: Mesh
    device: torch.device
    visual_tokenizer: VisualTokenizer | None
    """None on stages of a pipeline without heads."""
    heldout: Iterable[PackedBatch]
    store: CheckpointStore
    history: History
    progress: Progress
    first_step: int
    """Updates already done when this process started."""

    @property
    def engine(self) -> DeepSpeedEngine:
        """DeepSpeed's engine around this stage's layers."""
        return self.schedule.engine

    def prepare(self, batch: PackedBatch) -> PackedBatch:
        """Moves a micro-batch to the device, with visual targets where the heads are."""
        return prepare_batch(batch, self.visual_tokenizer, self.device)


def resume(engine: DeepSpeedEngine, store: CheckpointStore, history: History, mesh: Mesh) -> int:
    """Loads the newest whole checkpoint, if any, and drops what the history says of later steps. All ranks call it.

    Returns:
        The number of updates done, which is the step to go on with.
    """
    newest = store.newest()
    first_step = store.load(engine, newest) if newest else 0
    if mesh.is_main:
        history.forget_after(first_step if newest else -1)
        if newest:
            print(f"resuming after step {first_step} from {newest}", flush=True)
    return first_step


def train(run: Run, steps: Iterable[StepBatch]) -> None:
    """Trains from `run.first_step` to the end, with progress lines, evaluations and checkpoints on the way.

    Args:
        run: the parts.
        steps: this rank's share of every step from `first_step` on.

    Raises:
        ConfigError: if too many records are broken.
        NonFiniteLossError: if loss or gradient norm is not finite.
    """
    config = run.config.training
    budget = BrokenRecordBudget(run.config.data.max_broken_records, run.mesh)
    if run.first_step == 0:
        _evaluate_and_record(run, 0)
    for step_batch, data_seconds in _timed(steps):
        start = time.perf_counter()
        counts = budget.agree(step_batch)
        rate = learning_rate(config, step_batch.step)
        sums, grad_norm = _update(run, step_batch, counts, rate)
        done = step_batch.step + 1
        run.progress.add(step_batch, sums, data_seconds, data_seconds + time.perf_counter() - start)
        if done % config.log_interval == 0 or done == config.total_steps:
            _report(run, done, rate, grad_norm, budget)
        if done % config.eval_interval == 0 or done == config.total_steps:
            _evaluate_and_record(run, done)
        if done % config.save_interval == 0 or done == config.total_steps:
            folder = run.store.save(run.engine, done)
            _say(run, f"saved {folder}")


def _update(run: Run, step_batch: StepBatch, counts: Tensor, rate: float) -> tuple[Tensor, float]:
    for group in run.engine.optimizer.param_groups:
        group["lr"] = rate
    factors = build_loss_factors(counts, run.config.training.loss_weights, run.mesh.data_parallel_size)
    sums = run.schedule.accumulate_gradients(step_batch.micro_batches, factors.to(run.device), run.prepare)
    return sums, apply_update(run.engine, run.mesh)


def _report(run: Run, done: int, rate: float, grad_norm: float, budget: BrokenRecordBudget) -> None:
    record = run.progress.report(done, rate, grad_norm)
    if budget.total:
        record["broken_records"] = budget.total
    _record(run, record)
    _say(run, format_line(record, run.config.training.total_steps))
    if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
        raise NonFiniteLossError(
            f"step {done}: loss {record['loss']}, gradient norm {record['grad_norm']}. The run stops here; the newest "
            f"checkpoint is {run.store.newest()}. A lower training.learning_rate or gradient_clipping usually helps."
        )


def _evaluate_and_record(run: Run, done: int) -> None:
    terms = evaluate(run.schedule, run.heldout, run.visual_tokenizer, run.mesh, run.device)
    record = {"step": done, "kind": "heldout", **terms}
    _record(run, record)
    _say(run, format_evaluation(record))


def _record(run: Run, record: dict[str, Any]) -> None:
    """Writes to metrics.jsonl and, through DeepSpeed's monitor, to CSV and TensorBoard."""
    if not run.mesh.is_main:
        return
    run.history.append(record)
    values = {key: value for key, value in record.items() if key not in ("step", "kind")}
    run.engine.monitor.write_events(
        [(f"{record['kind']}/{key}", value, record["step"]) for key, value in values.items()]
    )


def _say(run: Run, line: str) -> None:
    if run.mesh.is_main:
        print(line, flush=True)


def _timed(steps: Iterable[StepBatch]) -> Iterator[tuple[StepBatch, float]]:
    """Yields each step with the seconds that were spent waiting for it."""
    iterator = iter(steps)
    while True:
        start = time.perf_counter()
        step_batch = next(iterator, None)
        if step_batch is None:
            return
        yield step_batch, time.perf_counter() - start
