"""Runs the training loop of any task: resume, update, evaluate, report and save."""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

from deepspeed import DeepSpeedEngine
from torch import Tensor

from beit3_ds.batch import StepBatch
from beit3_ds.checkpoint.engine_state import EngineState
from beit3_ds.checkpoint.index import Index
from beit3_ds.checkpoint.store import CheckpointStore, SaveOutcome
from beit3_ds.config import ConfigError
from beit3_ds.data.order.run import POSITIONS
from beit3_ds.data.workers.waiting import StopRequestedError
from beit3_ds.device_copy import copy_to_device
from beit3_ds.parallel import Mesh
from beit3_ds.runtime.distributed_stop_signals import DistributedStopSignals
from beit3_ds.runtime.stop_signals import StopSignals
from beit3_ds.storage_error import StorageError
from beit3_ds.training.broken_records import BROKEN_RECORDS, StepCounts, format_new_records
from beit3_ds.training.engine import apply_update
from beit3_ds.training.evaluation import VALIDATION_FOLDER, evaluate, evaluate_split
from beit3_ds.training.learning_rate import learning_rate
from beit3_ds.training.loss import build_loss_factors
from beit3_ds.training.loss_spikes import LossSpikes, format_spike
from beit3_ds.training.metrics_log import MetricsLog
from beit3_ds.training.optimizer import set_learning_rate
from beit3_ds.training.progress import Update, format_evaluation, format_line
from beit3_ds.training.run import Run
from beit3_ds.training.skipped_steps import NonFiniteLossError, SkippedSteps
from beit3_ds.training.step_feed import StepFeed

EVALUATION_DUE = "evaluation_due"
"""Key in `Index.data` that marks a checkpoint whose evaluation was cancelled by a stop signal. The next start evaluates
the checkpoint first, so that no evaluation is missing."""


class Resumption(NamedTuple):
    """Holds the step and the checkpoint from which a run continues."""

    first_step: int
    """Index of the next step, from 0, which is also the number of steps done; 0 without a checkpoint."""
    checkpoint: Index | None
    """Content of the checkpoint's index file, including the position in the training data; None without a checkpoint.
    """


def resume(
    engine: DeepSpeedEngine,
    state: EngineState,
    store: CheckpointStore,
    metrics_log: MetricsLog,
    mesh: Mesh,
    total_steps: int,
) -> Resumption:
    """Loads the newest valid checkpoint, if any, and deletes the metrics of later steps.

    Without a checkpoint, renames the metrics file of an earlier run. All ranks must call this function.

    Raises:
        ConfigError: if the checkpoint has another model, other tokenizers, or more than `total_steps` steps.
    """
    newest = store.agree_on_newest()
    if newest and newest.step > total_steps:
        raise ConfigError(
            f"training.total_steps={total_steps} is less than {newest.step}, the step of checkpoint {newest.path}. "
            f"Set it to {newest.step} or more, or use another training.output_dir for a shorter run."
        )
    first_step = store.load(state, newest) if newest else 0
    engine.global_steps = first_step  # the count in DeepSpeed's own logs
    if mesh.is_main:
        engine.monitor.forget_after(first_step if newest else -1)
        if newest:
            metrics_log.forget_after(first_step)
            print(f"resuming after step {first_step} from {newest.path}", flush=True)
            if first_step == total_steps:
                print(
                    f"nothing is left to train: the checkpoint holds all training.total_steps={total_steps} steps. "
                    "Raise total_steps to train longer.",
                    flush=True,
                )
        elif moved := metrics_log.move_aside():
            print(f"there is no checkpoint to resume from; records of an earlier run are now in {moved}", flush=True)
    return Resumption(first_step, newest.index if newest else None)


def train(run: Run, steps: Iterable[StepBatch], signals: StopSignals) -> bool:
    """Trains from `run.first_step` to the end, with progress reports, evaluations and checkpoints.

    When a rank receives a stop signal, all ranks finish the current step, save a checkpoint and return. This takes at
    most the time of one step and two saves: if an earlier save is still running, the last save waits for its end. A
    rank that waits for the data of the next step stops waiting. An evaluation stops between two batches, and the next
    start repeats it. If the signal arrives before the first step, all ranks return at once.

    Args:
        run: parts of the run.
        steps: this rank's share of each step, from `run.first_step` on.
        signals: stop signals that this rank receives.

    Returns:
        True if the run is finished, and False if a signal stopped it.

    Raises:
        ConfigError: if there are too many broken records, the last checkpoint cannot be written, or a rank gets no
            data. In the last case, the state after the last finished step is saved first.
        StorageError: if a save times out, or if a rank gets no data because a file system failed. In the second case,
            the state after the last finished step is saved first.
        NonFiniteLossError: if `training.max_skipped_steps` consecutive steps have a non-finite loss or gradient. The
            newest checkpoint then holds the weights from before these steps.
    """
    stop = DistributedStopSignals(signals, run.mesh)
    if stop.synchronize() and run.first_step < run.config.training.total_steps:
        _say(run, f"stopped on {stop.names} before step {run.first_step + 1}; the same command resumes from there")
        return False
    try:
        return _train(run, steps, stop)
    except (ConfigError, StorageError, NonFiniteLossError):  # raised on all ranks at the same step
        run.store.finish()
        raise


def _train(run: Run, steps: Iterable[StepBatch], stop: DistributedStopSignals) -> bool:
    config = run.config.training
    step_counts = StepCounts(run.broken_records, run.mesh)
    skipped, spikes = SkippedSteps(config.max_skipped_steps, run.mesh), LossSpikes()
    run.store.reserve_memory(run.state)
    done = run.first_step
    has_unsaved_update = False  # whether an update was done since the last save or resume
    feed = StepFeed(steps, run.mesh.activity, done)
    feed.attempt(run.read_validation)
    stop.synchronize(feed.error)
    is_evaluated = _complete_evaluation(run, stop)
    if run.best.is_exhausted:
        _say(run, f"{_early_stop(run)}; nothing is left to train")
        return _finish(run, feed, stop, done, is_evaluated=is_evaluated)
    if not stop.must_stop and done < config.total_steps and _prepare_step(run, stop, done):
        if done == 0:
            _evaluate(run, stop, 0)
        feed.fetch()
        stop.synchronize(feed.error)
    while not stop.must_stop and done < config.total_steps:
        step_batch, data_seconds = feed.take()
        start = time.perf_counter()
        if done > run.first_step and not _prepare_step(run, stop, done):
            if has_unsaved_update:
                run.store.save(run.state, done, _data_state(run, done))
            break
        update = _train_step(run, step_batch, step_counts, feed)
        seconds = data_seconds + time.perf_counter() - start - feed.upcoming_seconds
        done = step_batch.step + 1
        run.progress.add(step_batch, update, data_seconds, seconds)
        if update.is_skipped:
            _report_skip(run, skipped, step_batch, update)
        else:
            run.state.update_average()
            has_unsaved_update = True
            skipped.note_update()
        del step_batch
        is_last = done == config.total_steps
        stop.synchronize(feed.error)
        if (done % config.log_interval == 0 or is_last or stop.must_stop) and run.progress.has_updates:
            _report(run, done, skipped, spikes)
        if skipped.are_too_many:
            _end_diverged(run, done, skipped, must_save=has_unsaved_update)
        is_evaluated, is_best = True, False
        if done % config.eval_interval == 0 or is_last:
            is_evaluated, is_best = _evaluate(run, stop, done)
        _report_saves(run)  # before the save: the outcome of the last save is read after the loop
        if done % config.save_interval == 0 or is_last or stop.must_stop or is_best or run.best.is_exhausted:
            run.store.save(run.state, done, _data_state(run, done, is_evaluated=is_evaluated))
            has_unsaved_update = False
        if run.best.is_exhausted:
            _say(run, _early_stop(run))
            break
    return _finish(run, feed, stop, done, is_evaluated=is_evaluated)


def _complete_evaluation(run: Run, stop: DistributedStopSignals) -> bool:
    """Repeats the evaluation at the step from which the run resumes, if a stop signal cancelled this evaluation.

    Saves a checkpoint after the repeated evaluation has completed.

    Returns:
        False if a stop signal has cancelled the evaluation again, otherwise True.
    """
    if not run.data.get(EVALUATION_DUE):
        return True
    if not stop.must_stop:
        _say(run, f"evaluating the weights of step {run.first_step} again, because a stop cancelled that before")
        run.rank_task.resume(run, run.first_step)
    is_evaluated, _ = _evaluate(run, stop, run.first_step)
    if is_evaluated:
        run.store.save(run.state, run.first_step, _data_state(run, run.first_step))
    return is_evaluated


def _prepare_step(run: Run, stop: DistributedStopSignals, step: int) -> bool:
    """Lets the task prepare a step, and returns whether the preparation is complete.

    If a stop signal cancels the preparation, updates `stop` on all ranks and returns False.
    """
    try:
        run.rank_task.before_step(run, step)
    except StopRequestedError:
        stop.synchronize()
        return False
    return True


def _train_step(run: Run, step_batch: StepBatch, step_counts: StepCounts, feed: StepFeed) -> Update:
    counts, new_records = step_counts.agree(step_batch)
    for line in format_new_records(new_records, run.broken_records.total, run.config.data.max_broken_records):
        _say(run, line)
    rate = learning_rate(run.config.training, step_batch.step)
    update = _update(run, step_batch, counts, rate, lambda: _fetch_next(run, feed, step_batch.step + 1))
    run.rank_task.after_step(run, is_skipped=update.is_skipped)
    return update


def _early_stop(run: Run) -> str:
    number = run.config.training.early_stop_evaluations
    return f"stops early: the last {number} evaluations are not better than {run.best.describe()}"


def _finish(run: Run, feed: StepFeed, stop: DistributedStopSignals, done: int, *, is_evaluated: bool) -> bool:
    """Waits for the last save, reports why the run ends, and returns whether all steps and evaluations are done.

    Raises:
        ConfigError: if the last checkpoint was not written, or a rank got no data although all file systems work.
        StorageError: if a rank got no data because a file system failed.
    """
    run.store.finish()
    outcomes = _report_saves(run)
    if outcomes and outcomes[-1].error:
        raise ConfigError(
            f"the checkpoint of step {done} could not be written: {outcomes[-1].error}. The newest whole one is "
            f"{run.store.newest_path()}; free space or fix the folder, then start the same command again: it "
            "resumes from there."
        )
    if stop.data_fault is not None:
        _say(run, f"a rank got no data for step {done + 1}; the same command resumes from step {done}")
        feed.raise_error(is_storage=stop.data_fault == "storage")
    is_finished = is_evaluated and (done == run.config.training.total_steps or run.best.is_exhausted)
    if not is_finished:
        pending = "" if is_evaluated else ", before it was evaluated"
        _say(run, f"stopped after step {done} on {stop.names}{pending}; the same command resumes from there")
    return is_finished


def _data_state(run: Run, done: int, *, is_evaluated: bool = True) -> dict[str, Any]:
    """Returns `Index.data` for a checkpoint after `done` steps, such as the position in the training data.

    Used on the main rank.
    """
    state: dict[str, Any] = {} if run.order is None else {POSITIONS: run.order.state_after(done)}
    state |= {BROKEN_RECORDS: run.broken_records.state()} | run.best.state()
    return state if is_evaluated else state | {EVALUATION_DUE: True}


def _report_skip(run: Run, skipped: SkippedSteps, step_batch: StepBatch, update: Update) -> None:
    """Counts a skipped step, and reports the ranks with non-finite gradients."""
    record = skipped.add(step_batch, update.grad_norm, run.schedule.probe)
    _record(run, record)
    _say(run, skipped.describe(record))


def _end_diverged(run: Run, done: int, skipped: SkippedSteps, *, must_save: bool) -> NoReturn:
    """Ends a diverged run with an error. Before that, saves a checkpoint if `must_save` is true.

    Skipped steps do not change the weights, so the checkpoint holds the weights from before the skipped steps. If a
    checkpoint already holds these weights, `must_save` is false. Saving the same weights at every restart would delete
    all older checkpoints.
    """
    if must_save:
        run.store.save(run.state, done, _data_state(run, done))
    run.store.finish()
    _report_saves(run)
    raise NonFiniteLossError(
        f"steps {done - skipped.in_a_row + 1} to {done} were skipped because losses or gradients were not finite: "
        f"training.max_skipped_steps={skipped.limit} in a row. The run stops here; the newest checkpoint, "
        f"{run.store.newest_path()}, holds the weights from before them. If the same rank is named above each time, "
        "look at its device and samples; else training diverged: lower training.learning_rate or gradient_clipping, "
        "perhaps from an older checkpoint (delete the newer ones)."
    )


def _report_saves(run: Run) -> list[SaveOutcome]:
    """Reports and returns the outcomes of the saves that have ended since the last call."""
    outcomes = run.store.take_outcomes()
    for outcome in outcomes:
        if outcome.error:
            whole = run.store.newest_path()
            _say(run, f"WARNING: checkpoint {outcome.path} was not written: {outcome.error}. Newest whole one: {whole}")
        else:
            seconds = f"{outcome.seconds:.1f} s, training waited {outcome.held_up_seconds:.1f} s"
            _say(run, f"saved {outcome.path} ({seconds})")
        figures = {"seconds": outcome.seconds, "held_up_seconds": outcome.held_up_seconds}
        _record(run, {"step": outcome.step, "kind": "checkpoint", **figures, "failed": bool(outcome.error)})
    return outcomes


def _fetch_next(run: Run, feed: StepFeed, done: int) -> None:
    """Fetches the data of the next step, and starts copying them to the device. Does nothing after the last step."""
    if done < run.config.training.total_steps:
        feed.fetch()
        run.moves.announce(feed.upcoming)


def _update(run: Run, step_batch: StepBatch, counts: Tensor, rate: float, fetch_next: Callable[[], None]) -> Update:
    """Computes the gradients of a step, fetches the data of the next step, and updates the weights.

    A GPU still computes the gradients during the fetch, so fetching and transfer cost no extra time. Before any rank
    starts the next step, all ranks learn whether every rank has the data for that step.
    """
    set_learning_rate(run.engine.optimizer, rate)
    mesh = run.mesh
    factors = copy_to_device(build_loss_factors(counts, run.terms, mesh.data_parallel_size), run.device)
    sums = run.schedule.accumulate_gradients(step_batch.micro_batches, factors, run.prepare)
    loss = (sums * factors).sum() / mesh.data_parallel_size * (mesh.tensor.rank == 0)  # other ranks have equal sums
    fetch_next()
    mesh.activity.begin("update", step_batch.step + 1)
    return Update(sums, apply_update(run.engine, mesh), rate, loss)


def _report(run: Run, done: int, skipped: SkippedSteps, spikes: LossSpikes) -> None:
    steps, seconds = run.progress.interval.steps, run.progress.interval.seconds
    figures, lines = run.stragglers.report(steps, seconds / steps)
    for spike in spikes.find(run.progress.losses()):
        _record(run, spike)
        lines.append(format_spike(spike))
    own_figures, own_lines = run.rank_task.figures()
    lines.extend(own_lines)
    record = run.progress.report(done) | figures | dict(own_figures)
    totals = {BROKEN_RECORDS: run.broken_records.total, "skipped_steps": skipped.total, "loss_spikes": spikes.total}
    record |= {name: total for name, total in totals.items() if total}
    _record(run, record)
    _say(run, "\n".join([format_line(record, run.config.training.total_steps, run.terms), *lines]))


def _evaluate(run: Run, stop: DistributedStopSignals, done: int) -> tuple[bool, bool]:
    """Evaluates the weights after `done` steps and records the result. All ranks must call this function.

    A stop signal cancels the evaluation between two batches, and `stop` is then updated on all ranks.

    Returns:
        Whether the weights were evaluated, and whether the evaluation is the best so far (`training.best_metric`).
    """
    if stop.must_stop:
        return False, False
    try:
        return True, _evaluate_and_record(run, done)
    except StopRequestedError:
        stop.synchronize()
        return False, False


def _evaluate_and_record(run: Run, done: int) -> bool:
    """Evaluates loss terms and task metrics, and records them.

    Also writes result files if this evaluation may be the run's last one: after the last step, or because of early
    stopping.

    Returns:
        Whether the evaluation is the best so far (`training.best_metric`); False for the initial weights.

    Raises:
        StopRequestedError: on all ranks, if a rank received a stop signal.
    """
    names = run.config.data.source_names()
    is_last = done == run.config.training.total_steps or (done > 0 and run.best.may_be_exhausted_next)
    folder = run.results.inside(VALIDATION_FOLDER) if is_last else None
    with run.state.averaged_weights():
        means = evaluate(run.schedule, run.validation, run.prepare, run.terms, run.mesh, run.device, names)
        means |= evaluate_split(run.rank_task, run, "validation", folder)
    record = {"step": done, "kind": "validation", **means}
    _record(run, record)
    _say(run, format_evaluation(record, run.terms))
    is_best = done > 0 and run.best.add(done, means)
    if is_best:
        _say(run, f"the best evaluation so far: {run.best.describe()}")
    return is_best


def _record(run: Run, record: dict[str, Any]) -> None:
    """Writes a record to metrics.jsonl and to DeepSpeed's monitors; if the disk is full, writes it later."""
    if not run.mesh.is_main:
        return
    run.metrics_log.append(record)
    values = {key: value for key, value in record.items() if key != "step" and isinstance(value, int | float)}
    run.engine.monitor.write_events(
        [(f"{record['kind']}/{key}", value, record["step"]) for key, value in values.items()]
    )


def _say(run: Run, line: str) -> None:
    if run.mesh.is_main:
        print(line, flush=True)
