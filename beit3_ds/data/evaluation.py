"""Reads the samples of an evaluation split in batches, so that a task can compute metrics."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ConfigError, RunConfig
from beit3_ds.config.prefetch import image_bytes
from beit3_ds.data.files.descriptors import raise_open_file_limit
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.packing import Pack
from beit3_ds.data.samples import VALIDATION_EPOCH, SampleKey, Stream
from beit3_ds.data.validation import choose_samples
from beit3_ds.data.workers.pool import Preparation, prepare_in_order
from beit3_ds.data.workers.waiting import WaitLimits

_AHEAD = 2
"""Number of batches that each worker process prepares in advance."""
_GIB = 1 << 30

Plan = Mapping[str, Sequence[int]]
"""Maps each stream ("images", "pairs", "texts") to the indices of its samples in one batch."""


class EvaluationBatches:
    """Yields one rank's batches of an evaluation split; all ranks together read each evaluated sample once.

    `training.eval_batch_size`, and not the number of ranks, decides which samples share a batch. Rank r of R evaluates
    every R-th batch. Predictions are therefore bitwise equal on any number of ranks. Every rank has the same number of
    batches; some batches may be empty.
    """

    def __init__(
        self,
        config: RunConfig,
        streams: Mapping[str, Stream],
        pack: Pack,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        """Plans the batches; reads no sample yet.

        Args:
            config: the run's configuration; `training.eval_samples` limits the samples per stream.
            streams: samples by stream ("images", "pairs", "texts"). Each batch contains the streams in this order.
            pack: function that packs prepared samples into a batch.
            data_parallel_rank: rank that reads these batches.
            data_parallel_size: number of ranks that share the batches.
        """
        self.streams = dict(streams)
        self._config = config
        self._work = _BatchWork(self.streams, pack, config.training.validation_seed)
        chosen = {name: self._choose(name) for name in streams}
        size = config.training.eval_batch_size
        parts = {name: [of[i : i + size] for i in range(0, len(of), size)] for name, of in chosen.items()}
        num_batches = max((-(-len(of) // data_parallel_size) for of in parts.values()), default=0)
        numbers = [number * data_parallel_size + data_parallel_rank for number in range(num_batches)]
        self._plans = [
            {name: of[number] if number < len(of) else [] for name, of in parts.items()} for number in numbers
        ]
        self.num_samples = {name: len(of) for name, of in chosen.items()}
        """Number of evaluated samples by stream ("images", "pairs" or "texts"), summed over all ranks."""

    def __len__(self) -> int:
        """Returns the number of batches per rank, which is equal on all ranks."""
        return len(self._plans)

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yields this rank's batches; waits at most `data.timeout_seconds` for each batch."""
        return self.read(WaitLimits(seconds=self._config.data.timeout_seconds))

    def read(self, limits: WaitLimits) -> Iterator[PackedBatch]:
        """Yields this rank's batches; `limits` bounds the wait for each batch.

        Raises:
            ConfigError: if a record is broken, because scores without the record would not be comparable.
            DataTimeoutError: if a batch is not ready in time.
            StopRequestedError: if this process is asked to stop while it waits.
        """
        data = self._config.data
        set_up = functools.partial(raise_open_file_limit, data.max_open_files)
        preparation = Preparation(work=self._work, describe=_name_batch, limits=limits, set_up=set_up)
        return prepare_in_order(preparation, self._plans, self._num_workers(), _AHEAD)

    def _choose(self, name: str) -> list[int]:
        training, sizes = self._config.training, self.streams[name].sources.sizes
        if training.eval_samples is None:
            return list(range(sum(sizes)))
        chosen = choose_samples(sizes, training.eval_samples, training.validation_seed, name)
        return [index for of_source in chosen for index in of_source]

    def _num_workers(self) -> int:
        """Returns the number of worker processes, reduced if prepared batches would exceed `data.prefetch_gib`."""
        data = self._config.data
        sequences = sum(stream.sequences_per_sample for stream in self.streams.values())
        num_bytes = max(1, sequences * self._config.training.eval_batch_size * image_bytes(self._config, "model"))
        return min(data.num_workers, len(self), int(data.prefetch_gib * _GIB / (_AHEAD * num_bytes)))


class _BatchWork:
    """Prepares one batch from sample indices; can be pickled and sent to a worker process."""

    def __init__(self, streams: Mapping[str, Stream], pack: Pack, seed: int) -> None:
        self._streams, self._pack, self._seed = streams, pack, seed

    def __call__(self, plan: Plan, note: Callable[[str], None]) -> PackedBatch:
        samples = []
        for name, indices in plan.items():
            stream = self._streams[name]
            for index in indices:
                note(stream.name(index))
                try:
                    samples.append(stream.prepare(SampleKey(self._seed, name, VALIDATION_EPOCH, index)))
                except BrokenRecordError as error:
                    raise ConfigError(
                        f"data: record {error}. It is part of an evaluation: repair it, or remove it from the file."
                    ) from error
        return self._pack(samples, None, {})


def _name_batch(plan: Plan) -> str:
    parts = [f"{name} {indices[0] + 1} to {indices[-1] + 1}" for name, indices in plan.items() if indices]
    return f"the evaluation's batch of {', '.join(parts) or 'no samples'}"
