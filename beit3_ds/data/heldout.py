"""The fixed batches of the held-out loss."""

from collections.abc import Iterator, Mapping, Sequence

from beit3_ds.batch import ImageViews, PackedBatch
from beit3_ds.config import ConfigError, RunConfig
from beit3_ds.data.packing import ImageShape, image_shape, pack
from beit3_ds.data.samples import HELDOUT_EPOCH, SampleKey, Stream, build_heldout_streams
from beit3_ds.data.shards import BrokenRecord
from beit3_ds.tokenizers.text import TextTokenizer


class HeldoutBatches:
    """A list of batches that can be iterated at every evaluation.

    The first pass prepares the batches and keeps them in memory, about 1.2 MB an image with two views of 224 px;
    later passes only hand them out.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        plan: Sequence[Sequence[SampleKey]],
        shape: ImageShape,
        views: ImageViews = "both",
    ) -> None:
        """Takes the samples of each batch as `plan`; reads nothing yet."""
        self._streams, self._plan, self._shape, self._views = streams, plan, shape, views
        self._batches: list[PackedBatch] = []

    def __len__(self) -> int:
        """Batches, the same number on every rank; 0 if no stream has held-out files."""
        return len(self._plan)

    @property
    def streams(self) -> Mapping[str, Stream]:
        """The held-out samples of each stream."""
        return self._streams

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yields the batches, the same at every pass.

        Raises:
            ConfigError: naming a record that cannot be read: a mean over fewer samples would not compare.
        """
        for number, keys in enumerate(self._plan):
            if number == len(self._batches):
                self._batches.append(self._prepare(keys))
            yield self._batches[number]

    def _prepare(self, keys: Sequence[SampleKey]) -> PackedBatch:
        try:
            samples = [self._streams[key.stream].prepare(key) for key in keys]
        except BrokenRecord as error:
            raise ConfigError(
                f"data: held-out record {error}. Repair it, or make the shard anew without it."
            ) from error
        return pack(samples, None, self._shape, self._views)


def build_heldout_batches(
    config: RunConfig,
    text_tokenizer: TextTokenizer,
    data_parallel_rank: int,
    data_parallel_size: int,
    views: ImageViews = "both",
) -> HeldoutBatches:
    """Divides the first `training.eval_samples` held-out samples of every stream over the ranks.

    The samples, their middle crops and their masks are the same under every layout; only the cut into batches follows
    the ranks. A batch has at most the largest micro-batch's samples of each stream. Every rank has the same number of
    batches, of which the last may be smaller or empty, so that collectives meet. Streams without held-out files are
    absent.

    Raises:
        ConfigError: for files that cannot be read, or fewer samples per step than ranks.
    """
    streams = build_heldout_streams(config, text_tokenizer)
    micro_batch = config.step_shares(data_parallel_size).upper_bound
    # A stream that is evaluated but not trained has no micro-batch size of its own.
    sizes = {name: size or max(micro_batch) for name, size in micro_batch._asdict().items() if name in streams}
    totals = {name: min(len(stream), config.training.eval_samples) for name, stream in streams.items()}
    num_batches = max((-(-totals[name] // (sizes[name] * data_parallel_size)) for name in streams), default=0)

    def share(number: int) -> list[SampleKey]:
        keys: list[SampleKey] = []
        for name, size in sizes.items():
            first = (number * data_parallel_size + data_parallel_rank) * size
            indices = range(first, min(first + size, totals[name]))
            keys.extend(SampleKey(config.training.seed, name, HELDOUT_EPOCH, index) for index in indices)
        return keys

    return HeldoutBatches(streams, [share(number) for number in range(num_batches)], image_shape(config), views)
