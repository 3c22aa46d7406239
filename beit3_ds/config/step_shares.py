"""Divides the samples of a step over data-parallel ranks and micro-batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from beit3_ds.config.strict import ConfigError

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu")
"""DeepSpeed's keys for batch sizes. A DeepSpeed configuration may omit these keys, because streams and layout determine
the sizes."""


class SampleCounts(NamedTuple):
    """Holds the number of samples of each stream in a micro-batch, in a rank's share of a step, or in a whole step."""

    images: int
    pairs: int
    texts: int


@dataclass(frozen=True, kw_only=True)
class StepShares:
    """Divides the samples of one step over ranks and micro-batches as evenly as possible.

    The size of each share is found by dealing the samples like cards, one at a time, to each rank in turn. All images
    are dealt first, then all pairs, then all texts. The turn does not go back to rank 0 between these streams. Each
    rank divides its samples among its micro-batches in the same way. The totals of two ranks, or of two micro-batches
    of one rank, therefore differ by at most one sample. `slots` determines which samples a rank gets. Uneven shares do
    not change the loss, because each loss term is a mean over the samples or positions of the whole step.
    """

    samples: SampleCounts
    """Number of samples of each stream (images, pairs, texts) per step, summed over all ranks."""
    num_ranks: int
    """Number of data-parallel ranks."""
    num_micro_batches: int
    """Number of micro-batches per rank and step; some may be empty."""

    @property
    def is_even(self) -> bool:
        """Returns whether all micro-batches of all ranks have the same number of samples of each stream."""
        return not any(samples % (self.num_ranks * self.num_micro_batches) for samples in self.samples)

    @property
    def most_rank_samples(self) -> int:
        """Returns the number of samples per step (images, pairs and texts) on the rank with the most samples."""
        return -(-sum(self.samples) // self.num_ranks)

    @property
    def fewest_rank_samples(self) -> int:
        """Returns the number of samples per step (images, pairs and texts) on the rank with the fewest samples."""
        return sum(self.samples) // self.num_ranks

    @property
    def largest_micro_batch(self) -> SampleCounts:
        """Returns the largest number of samples per micro-batch, for each stream separately.

        The largest numbers of two streams may occur in different micro-batches.
        """
        parts = self.num_ranks * self.num_micro_batches
        return SampleCounts(*(-(-samples // parts) for samples in self.samples))

    def rank_samples(self, rank: int) -> SampleCounts:
        """Returns how many samples of each stream a data-parallel rank processes per step."""
        return _deal(self.samples, self.num_ranks, rank)

    def divide_rank(self, samples: SampleCounts) -> list[SampleCounts]:
        """Returns the number of samples of each stream in each micro-batch of one rank.

        Args:
            samples: number of samples of each stream that the rank has per step (`rank_samples`).
        """
        return [_deal(samples, self.num_micro_batches, number) for number in range(self.num_micro_batches)]

    def slots(self, rank: int) -> list[dict[str, range]]:
        """Returns the slots of each stream in each micro-batch of one data-parallel rank.

        A slot is the index of a sample among the samples of a stream in one step. Slots are assigned first to
        micro-batch 0 of every rank, in the order of the ranks, then to micro-batch 1 of every rank, and so on. If all
        micro-batches of R ranks have k samples of a stream, micro-batch m of rank r begins at slot (m*R + r)*k.
        """
        sizes = [self.divide_rank(self.rank_samples(other)) for other in range(self.num_ranks)]
        found: list[dict[str, range]] = []
        starts = [0] * len(self.samples)
        for micro_batch in range(self.num_micro_batches):
            for other in range(self.num_ranks):
                size = sizes[other][micro_batch]
                if other == rank:
                    ranges = (range(start, start + count) for start, count in zip(starts, size, strict=True))
                    found.append(dict(zip(SampleCounts._fields, ranges, strict=True)))
                starts = [start + count for start, count in zip(starts, size, strict=True)]
        return found

    def check_ranks(self) -> None:
        """Checks that every data-parallel rank has at least one sample per step.

        Raises:
            ConfigError: if a step has fewer samples than there are data-parallel ranks.
        """
        total = sum(self.samples)
        if total < self.num_ranks:
            raise ConfigError(
                f"data: {total} samples per step are fewer than the {self.num_ranks} data-parallel ranks, so some "
                f"ranks would have none. Raise data.*.samples_per_step, or use at most {total} data-parallel ranks."
            )

    def check_batch_keys(self, deepspeed: Mapping[str, Any]) -> None:
        """Checks that DeepSpeed's batch-size keys, if present, agree with the streams and the layout.

        Args:
            deepspeed: the run's DeepSpeed keys.

        Raises:
            ConfigError: if a batch size disagrees; the message names the key to leave out.
        """
        total, parts = sum(self.samples), self.num_ranks * self.num_micro_batches
        division = f"{total} samples per step / ({self.num_ranks} ranks x {self.num_micro_batches} micro-batches)"
        given = deepspeed.get("train_batch_size", total)
        if given != total:
            raise ConfigError(
                f"train_batch_size={given} contradicts the streams, which have {total} samples per step. Leave the key "
                "out: it is derived."
            )
        given = deepspeed.get("train_micro_batch_size_per_gpu")
        if given is not None and total % parts:
            raise ConfigError(
                f"train_micro_batch_size_per_gpu={given} cannot hold for every micro-batch: {division} is no whole "
                "number, so micro-batches differ by one sample. Leave the key out: it is derived."
            )
        if given is not None and given != total // parts:
            raise ConfigError(
                f"train_micro_batch_size_per_gpu={given} contradicts the streams: {division} gives {total // parts}. "
                "Leave the key out: it is derived."
            )


def _deal(samples: SampleCounts, num_hands: int, hand: int) -> SampleCounts:
    """Returns the number of samples of each stream that one receiver gets when all samples are dealt in turn.

    Args:
        samples: number of samples of each stream to deal.
        num_hands: number of receivers (ranks or micro-batches).
        hand: index of the receiver, from 0.
    """
    counts, dealt = [], 0
    for number in samples:
        every, rest = divmod(number, num_hands)
        counts.append(every + ((hand - dealt) % num_hands < rest))
        dealt += number
    return SampleCounts(*counts)
