"""Iterates over training steps, which worker processes prepare in advance."""

import functools
from collections.abc import Callable, Iterable, Iterator

from beit3_ds.batch import StepBatch
from beit3_ds.config import DataConfig
from beit3_ds.data.files.descriptors import raise_open_file_limit
from beit3_ds.data.steps import StepDataset
from beit3_ds.data.workers.pool import Preparation, prepare_in_order
from beit3_ds.data.workers.waiting import StopRequestedError, WaitLimits


def build_train_loader(
    dataset: StepDataset, config: DataConfig, first_step: int, limits: WaitLimits | None = None
) -> Iterable[StepBatch]:
    """Builds an iterable over the steps of one rank, from `first_step` to the end of the run.

    Each of n worker processes prepares every n-th step; the steps are yielded in order. A worker that dies or stays
    suspended is replaced. A broken record is skipped and listed in `StepBatch.broken_records`. Without
    `data.cache_dir`, each worker keeps its own shard index and tokens.

    The prepared steps of a rank take at most `data.prefetch_gib` of shared memory (`StepDataset.prefetch`). A pixel of
    a view takes 3 bytes in pretraining and 12 bytes in fine-tuning. Two views of 224 px take 0.3 MB or 1.2 MB per
    image. If shared memory is full, each worker keeps one step in its own memory.

    Each worker imports the program's main module again, so the program must start under `if __name__ == "__main__"`.

    Args:
        dataset: this rank's share of each step.
        config: data section of the run's config.
        first_step: index of the first step. To resume a run, call `RunOrder.resume` first.
        limits: limits of the wait for a step. If a stop signal arrives during a wait, the iteration ends early. If
            None, the limit is `data.timeout_seconds`, and stop signals are ignored.

    Raises:
        DataTimeoutError: if a step does not arrive in time.
        WorkerLossError: if several workers die or stay suspended during one step.
    """
    limits = limits or WaitLimits(seconds=config.timeout_seconds)
    return _Steps(dataset, config, range(first_step, len(dataset)), limits)


class _Steps:
    def __init__(self, dataset: StepDataset, config: DataConfig, steps: range, limits: WaitLimits) -> None:
        self._plan, self._steps = dataset.prefetch, steps
        set_up = functools.partial(raise_open_file_limit, config.max_open_files)
        self._preparation = Preparation(work=_StepWork(dataset), describe=_name_step, limits=limits, set_up=set_up)

    def __iter__(self) -> Iterator[StepBatch]:
        plan = self._plan
        try:
            yield from prepare_in_order(self._preparation, self._steps, plan.num_workers, plan.steps_per_worker)
        except StopRequestedError:
            return


class _StepWork:
    """Prepares one step by its index; can be pickled and sent to a worker process."""

    def __init__(self, dataset: StepDataset) -> None:
        self._dataset = dataset

    def __call__(self, step: int, note: Callable[[str], None]) -> StepBatch:
        return self._dataset.prepare(step, note)


def _name_step(step: int) -> str:
    return f"step {step + 1}"
