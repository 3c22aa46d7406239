"""Builds one rank's micro-batches of an optimizer step. A step can be built without the steps before it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from beit3_ds.batch import PackedBatch, StepBatch
from beit3_ds.config import RunConfig
from beit3_ds.config.prefetch import PrefetchPlan
from beit3_ds.data.drop_path import Slot, draw_drop_path
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.order.run import RunOrder
from beit3_ds.data.packing import Pack
from beit3_ds.data.samples import SampleKey, SourceSamples, Stream, name_sources


def _say_nothing(name: str) -> None:
    """Ignores the name of a sample; the default value of `note` in `StepDataset.prepare`."""


class StepDataset(Dataset[StepBatch]):
    """Map-style dataset: item `step` contains one data-parallel rank's micro-batches of that optimizer step.

    The samples of a step depend only on the seed, the step and the data (`RunOrder`). Within a step, the samples of
    each stream (images, pairs, texts) are numbered 0, 1, 2, ... Ranks and micro-batches divide these numbers, called
    slots, among themselves (`StepShares.slots`). If a record is broken, its slot stays empty.

    Attributes:
        order: order of the run's samples. A resumed run must call `order.resume` before it reads a step.
        prefetch: plan with the number of workers and the number of steps that they prepare in advance.
    """

    def __init__(
        self,
        config: RunConfig,
        streams: Mapping[str, Stream],
        pack: Pack,
        data_parallel_rank: int,
        data_parallel_size: int,
        prefetch: PrefetchPlan,
    ) -> None:
        """Determines this rank's share of every step; reads no sample yet.

        Args:
            config: the run's configuration.
            streams: training samples by stream ("images", "pairs", "texts"). Each micro-batch contains the streams in
                this order.
            pack: function that packs prepared samples into a micro-batch.
            data_parallel_rank: rank that reads these steps.
            data_parallel_size: number of ranks that share a step.
            prefetch: number of workers, and number of steps that the workers prepare in advance.

        Raises:
            ConfigError: if a training step has fewer samples than there are data-parallel ranks.
        """
        assert 0 <= data_parallel_rank < data_parallel_size, f"rank {data_parallel_rank} of {data_parallel_size}"
        self._config = config
        self._slots = config.step_shares(data_parallel_size).slots(data_parallel_rank)
        self.prefetch = prefetch
        self._streams, self._pack = dict(streams), pack
        sources = {name: stream.sources for name, stream in self._streams.items()}
        self.order = RunOrder(config.data, config.training.seed, sources)

    def __len__(self) -> int:
        """Returns the number of steps in the run."""
        return self._config.training.total_steps

    def epochs(self) -> dict[str, float]:
        """Returns how many epochs of each stream the whole run trains on; the numbers may be fractional."""
        streams, steps = self._config.data.streams(), self._config.training.total_steps
        return {name: steps * streams[name].samples_per_step / len(stream) for name, stream in self._streams.items()}

    def sources(self) -> dict[str, SourceSamples]:
        """Maps names such as "data.images.train[0] (images/*.tar)" to the samples of each source."""
        return name_sources("train", self._streams, self._config.data)

    def __getitem__(self, step: int) -> StepBatch:
        """Reads, prepares and packs this rank's samples of optimizer step `step`."""
        return self.prepare(step)

    def prepare(self, step: int, note: Callable[[str], None] = _say_nothing) -> StepBatch:
        """Reads, prepares and packs this rank's samples of an optimizer step.

        Args:
            step: index of the step, from 0.
            note: function called with the name of each sample before the sample is read.
        """
        broken: dict[str, str] = {}
        numbers = range(self._config.gradient_accumulation_steps)
        micro_batches = [self._micro_batch(step, number, broken, note) for number in numbers]
        return StepBatch(step=step, micro_batches=tuple(micro_batches), broken_records=broken)

    def iterate_samples(self, step: int) -> Iterator[Any]:
        """Yields this rank's prepared samples of a step one by one, without packing; omits broken records."""
        for number in range(self._config.gradient_accumulation_steps):
            for stream in self._streams:
                for _, key in self._keys(stream, step, number):
                    with contextlib.suppress(BrokenRecordError):
                        yield self._streams[stream].prepare(key)

    def _micro_batch(
        self, step: int, micro_batch: int, broken: dict[str, str], note: Callable[[str], None]
    ) -> PackedBatch:
        samples: list[Any] = []
        slots: list[Slot] = []
        for stream in self._streams:
            for slot, key in self._keys(stream, step, micro_batch):
                note(self._streams[stream].name(key.index))
                try:
                    samples.append(self._streams[stream].prepare(key))
                except BrokenRecordError as error:
                    broken[self._streams[stream].name(key.index)] = str(error)
                else:
                    slots += [slot._replace(sequence=i) for i in range(self._streams[stream].sequences_per_sample)]
        return self._pack(samples, self._draw_drop_path(step, slots), {})

    def _draw_drop_path(self, step: int, slots: list[Slot]) -> Tensor | None:
        model, seed = self._config.backbone, self._config.training.seed
        return None if model is None else draw_drop_path(model.drop_path_rate, model.num_layers, seed, step, slots)

    def _keys(self, stream: str, step: int, micro_batch: int) -> list[tuple[Slot, SampleKey]]:
        """Returns the slots and sample keys of one stream in one of this rank's micro-batches."""
        seed = self._config.training.seed
        slots = self._slots[micro_batch][stream]
        epochs, samples = self.order.samples(stream, step, slots)
        rows = zip(slots, epochs.tolist(), samples.tolist(), strict=True)
        return [(Slot(stream, number), SampleKey(seed, stream, epoch, index)) for number, epoch, index in rows]
