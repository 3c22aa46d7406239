"""The iterator over training steps, prepared ahead by worker processes."""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from multiprocessing import forkserver, resource_tracker

import torch
from torch.utils.data import DataLoader

from beit3_ds.batch import StepBatch
from beit3_ds.config import DataConfig
from beit3_ds.data.open_files import raise_open_file_limit
from beit3_ds.data.steps import StepDataset


def build_train_loader(dataset: StepDataset, config: DataConfig, first_step: int) -> Iterable[StepBatch]:
    """Iterates over the steps of a rank's `dataset` from `first_step` to the end of the run.

    Resuming needs nothing but the step once the dataset's order was resumed (`RunOrder.resume`). With `num_workers`
    above 0, each worker process prepares every n-th step of n workers; without `data.prepared_dir` it also holds a
    shard index and tokens of its own. The steps still come in order. A record that cannot be read is reported in its
    step and stops no worker.

    Prefetching is bounded: the finished steps of a rank take at most `data.prefetch_gib` of shared memory
    (`StepDataset.prefetch`). Nearly all of a step is pixels, 12 bytes for every pixel of a view: 1.2 MB per image with
    two views of 224 px.

    Workers import the program's main module anew, which must start under `if __name__ == "__main__"`.
    """
    steps = range(first_step, len(dataset))
    plan = dataset.prefetch
    if plan.num_workers == 0:
        return DataLoader(dataset, batch_size=None, sampler=steps)
    # Plain fork would copy the locks of threads that exist by now, and CUDA does not survive it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # imported once instead of by every worker
    _start_server_of_workers()
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=plan.num_workers,
        prefetch_factor=plan.steps_per_worker,
        worker_init_fn=functools.partial(_prepare_worker, config.max_open_files),
        multiprocessing_context=context,
    )


def _start_server_of_workers() -> None:
    """Starts the process from which workers are forked, if there is none, so that it and they are deaf to some signals.

    Clusters send SIGTERM or SIGUSR1, and terminals SIGINT, to all processes of a run, where they ask the ranks to end
    their step and save. What a step needs must still be there then.
    """
    resource_tracker.ensure_running()  # else the server starts it first, which unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})  # inherited
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker(max_open_files: int, worker: int) -> None:
    raise_open_file_limit(max_open_files)
    torch.set_num_threads(1)  # workers would fight with the training process for its cores
    threading.Thread(target=_end_with_rank, daemon=True).start()


def _end_with_rank() -> None:
    """Ends this worker when its rank is gone, killed perhaps.

    Torch's own workers watch the process that they were forked from, which lives as long as one of them does.
    """
    rank = multiprocessing.parent_process()
    assert rank is not None, "this is no worker"
    rank.join()
    os._exit(1)
