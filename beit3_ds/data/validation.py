"""Builds fixed batches for the validation loss."""

import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ConfigError, RunConfig
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.order.permutation import KeyedPermutation
from beit3_ds.data.packing import Pack
from beit3_ds.data.randomness import sample_rng
from beit3_ds.data.samples import VALIDATION_EPOCH, SampleKey, Stream
from beit3_ds.data.workers.waiting import ReaderThread, StopRequestedError, WaitLimits


class ValidationBatches:
    """Yields this rank's batches of the validation loss, the same batches at every evaluation.

    The first pass prepares the batches and keeps them in memory, about 0.3 MB per image with two views of 224 px.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        plan: Sequence[Mapping[str, Sequence[SampleKey]]],
        pack: Pack,
    ) -> None:
        """Stores its arguments; reads no sample yet.

        Args:
            streams: validation samples by stream.
            plan: keys of the samples of each batch, by stream; a batch has samples of one source per stream.
            pack: packs prepared samples into a batch.
        """
        self._streams, self._plan, self._pack = streams, plan, pack
        self._batches: list[PackedBatch] = []
        self._reads = ""

    def __len__(self) -> int:
        """Returns the number of batches, the same on every rank; 0 if no stream has validation files."""
        return len(self._plan)

    @property
    def streams(self) -> Mapping[str, Stream]:
        """Returns the validation samples of each stream."""
        return self._streams

    def read(self, limits: WaitLimits) -> None:
        """Prepares the batches that are not in memory yet; returns early on a stop signal.

        Raises:
            ConfigError: if a record is broken, or takes longer to read than the time limit; the message names it.
        """
        thread = ReaderThread("reading validation data")
        try:
            for number in range(len(self._batches), len(self._plan)):
                work = functools.partial(self._prepare, self._plan[number])
                describe = functools.partial(self._describe, number)
                self._batches.append(thread.call(work, limits, describe))
        except StopRequestedError:
            return
        finally:
            thread.close()

    def _describe(self, number: int) -> str:
        return f"validation batch {number + 1} of {len(self._plan)}, reading {self._reads or 'its files'}"

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yields the batches, the same in every pass.

        Raises:
            ConfigError: if a record is broken, because means without it would not be comparable.
        """
        for number, keys in enumerate(self._plan):
            if number == len(self._batches):
                self._batches.append(self._prepare(keys))
            yield self._batches[number]

    def _prepare(self, plan: Mapping[str, Sequence[SampleKey]]) -> PackedBatch:
        try:
            samples = []
            for stream, keys in plan.items():
                for key in keys:
                    self._reads = self._streams[stream].name(key.index)
                    samples.append(self._streams[stream].prepare(key))
        except BrokenRecordError as error:
            raise ConfigError(
                f"data: validation record {error}. Repair it, or rewrite the shard without it."
            ) from error
        sources = {
            stream: self._streams[stream].sources.source_of(keys[0].index) for stream, keys in plan.items() if keys
        }
        return self._pack(samples, None, sources)


def build_validation_batches(
    config: RunConfig,
    streams: Mapping[str, Stream],
    pack: Pack,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> ValidationBatches:
    """Builds this rank's batches from at most `TrainingConfig.loss_samples` validation samples per stream.

    Samples (`choose_samples`), center crops and masks depend only on `training.validation_seed`, so they are the same
    in every layout. A batch has samples of one source per stream, at most as many as the largest micro-batch. Every
    rank has the same number of batches; some may be smaller or empty. Streams without validation files are left out.

    Args:
        config: the run's configuration.
        streams: validation samples by stream, in the order of their rows in a batch.
        pack: packs prepared samples into a batch.
        data_parallel_rank: rank whose share is read.
        data_parallel_size: number of ranks that share the batches.

    Raises:
        ConfigError: if there are fewer samples per step than ranks.
    """
    micro_batch = config.step_shares(data_parallel_size).upper_bound
    # A stream that is only evaluated has no micro-batch size.
    sizes = {name: size or max(micro_batch) for name, size in micro_batch._asdict().items() if name in streams}
    seed = config.training.validation_seed
    parts: dict[str, list[list[SampleKey]]] = {}
    for name, size in sizes.items():
        chosen = choose_samples(streams[name].sources.sizes, config.training.loss_samples, seed, name)
        keys = [[SampleKey(seed, name, VALIDATION_EPOCH, index) for index in of_source] for of_source in chosen]
        parts[name] = [of_source[i : i + size] for of_source in keys for i in range(0, len(of_source), size)]
    num_batches = max((-(-len(of_stream) // data_parallel_size) for of_stream in parts.values()), default=0)

    def share(number: int) -> dict[str, list[SampleKey]]:
        own = number * data_parallel_size + data_parallel_rank
        return {name: of_stream[own] if own < len(of_stream) else [] for name, of_stream in parts.items()}

    return ValidationBatches(streams, [share(number) for number in range(num_batches)], pack)


def choose_samples(sizes: Sequence[int], limit: int, seed: int, stream: str) -> list[list[int]]:
    """Chooses the samples of a stream to evaluate, spread over all sources.

    Every source gets a share of `limit` in proportion to its size, and at least one sample if `limit` allows it.
    Samples are drawn at random within a source. A higher limit adds samples to those of a lower limit, up to rounding.

    Args:
        sizes: number of samples in each source; the stream numbers all samples consecutively.
        limit: maximum samples in total.
        seed: seeds the draw (`training.validation_seed`).
        stream: name of the stream.

    Returns:
        For each source, the numbers in the stream of its chosen samples, ascending.
    """
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    chosen: list[list[int]] = []
    for source, (start, size, share) in enumerate(zip(starts, sizes, divide_by_size(sizes, limit), strict=True)):
        if share == 0:
            chosen.append([])
            continue
        permutation = KeyedPermutation(size, sample_rng(seed, "validation samples", stream, source))
        chosen.append(sorted((start + permutation(np.arange(share))).tolist()))
    return chosen


def divide_by_size(sizes: Sequence[int], limit: int) -> list[int]:
    """Returns each source's share of at most `limit` samples, in proportion to the sources' sizes.

    Shares are rounded down, and the largest remainders get the remaining samples. Each source that still has none takes
    one from the largest share, if that share has at least two.
    """
    total = sum(sizes)
    limit = min(limit, total)
    exact = [limit * size / total if total else 0.0 for size in sizes]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda source: (shares[source] - exact[source], source))
    for source in by_remainder[: limit - sum(shares)]:
        shares[source] += 1
    for source, size in enumerate(sizes):
        largest = shares.index(max(shares))
        if size and not shares[source] and shares[largest] > 1:
            shares[source], shares[largest] = 1, shares[largest] - 1
    return shares
