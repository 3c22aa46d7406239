"""Builds the fixed batches on which the validation loss is computed."""

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
    """Yields this rank's batches for the validation loss; every evaluation gets the same batches.

    The first pass prepares the batches and keeps them in memory, about 0.3 MB per image with two views of 224 px.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        plan: Sequence[Mapping[str, Sequence[SampleKey]]],
        pack: Pack,
    ) -> None:
        """Stores the plan of the batches; reads no sample yet.

        Args:
            streams: validation samples by stream ("images", "pairs", "texts").
            plan: sample keys of each batch, by stream. All samples of a stream in one batch come from one source.
            pack: function that packs prepared samples into a batch.
        """
        self._streams, self._plan, self._pack = streams, plan, pack
        self._batches: list[PackedBatch] = []
        self._reads = ""

    def __len__(self) -> int:
        """Returns the number of batches, equal on every rank; 0 if no stream has validation files."""
        return len(self._plan)

    @property
    def streams(self) -> Mapping[str, Stream]:
        """Returns the validation samples of each stream."""
        return self._streams

    def read(self, limits: WaitLimits) -> None:
        """Prepares the batches that are not in memory yet; returns early on a stop signal.

        Raises:
            ConfigError: if a record is broken, or a batch is not ready within the time limit. The message names the
                broken record, or the late batch and the record that was being read.
        """
        thread = ReaderThread("reading validation data")
        try:
            for index in range(len(self._batches), len(self._plan)):
                work = functools.partial(self._prepare, self._plan[index])
                describe = functools.partial(self._describe, index)
                self._batches.append(thread.call(work, limits, describe))
        except StopRequestedError:
            return
        finally:
            thread.close()

    def _describe(self, index: int) -> str:
        return f"validation batch {index + 1} of {len(self._plan)}, reading {self._reads or 'its files'}"

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yields the batches, in the same order in every pass.

        Raises:
            ConfigError: if a record is broken, because a mean loss without the record would not be comparable.
        """
        for index, keys in enumerate(self._plan):
            if index == len(self._batches):
                self._batches.append(self._prepare(keys))
            yield self._batches[index]

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
    """Builds this rank's share of the batches for the validation loss.

    The batches of all ranks together contain at most `TrainingConfig.loss_samples` validation samples per stream.
    `training.validation_seed` selects the samples (`choose_samples`) and their masks. The layout of ranks does not
    change them. All crops are center crops. All samples of a stream in one batch come from one source. Per stream, a
    batch has at most as many samples as the largest training micro-batch has. For a stream without training samples,
    the largest such maximum of any other stream applies. Every rank has the same number of batches; some batches may be
    smaller or empty. Streams without validation files are omitted.

    Args:
        config: the run's configuration.
        streams: validation samples by stream ("images", "pairs", "texts"). Each batch contains the streams in this
            order.
        pack: function that packs prepared samples into a batch.
        data_parallel_rank: rank that reads these batches.
        data_parallel_size: number of ranks that share the batches.

    Raises:
        ConfigError: if a training step has fewer samples than there are data-parallel ranks.
    """
    micro_batch = config.step_shares(data_parallel_size).largest_micro_batch
    # A stream that is only evaluated has no micro-batch size.
    sizes = {name: size or max(micro_batch) for name, size in micro_batch._asdict().items() if name in streams}
    seed = config.training.validation_seed
    parts: dict[str, list[list[SampleKey]]] = {}
    for name, size in sizes.items():
        chosen = choose_samples(streams[name].sources.sizes, config.training.loss_samples, seed, name)
        keys = [[SampleKey(seed, name, VALIDATION_EPOCH, index) for index in of_source] for of_source in chosen]
        parts[name] = [of_source[i : i + size] for of_source in keys for i in range(0, len(of_source), size)]
    num_batches = max((-(-len(of_stream) // data_parallel_size) for of_stream in parts.values()), default=0)

    def share(index: int) -> dict[str, list[SampleKey]]:
        own = index * data_parallel_size + data_parallel_rank
        return {name: of_stream[own] if own < len(of_stream) else [] for name, of_stream in parts.items()}

    return ValidationBatches(streams, [share(index) for index in range(num_batches)], pack)


def choose_samples(sizes: Sequence[int], limit: int, seed: int, stream: str) -> list[list[int]]:
    """Chooses samples of a stream for evaluation, spread over all sources.

    Each source gets a share of `limit` in proportion to its size, and at least one sample if `limit` allows. Within a
    source, samples are drawn at random. If the limit is raised, the chosen samples stay chosen and others are added.
    There may be exceptions, because shares are rounded.

    Args:
        sizes: number of samples in each source. In the stream, the sources follow one another.
        limit: maximum number of samples in total.
        seed: seed of the draw (`training.validation_seed`).
        stream: name of the stream: "images", "pairs" or "texts".

    Returns:
        One list per source, which contains the chosen samples' indices in the stream, ascending.
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
    """Divides at most `limit` samples among sources in proportion to their sizes; returns each source's share.

    Shares are rounded down, and the sources with the largest remainders get the remaining samples. Each non-empty
    source whose share is still 0 takes one sample from the largest share, if that share has at least two.
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
