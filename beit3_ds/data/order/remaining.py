"""Represents the unused samples of an epoch by a few permutations, without listing the samples.

An epoch is one permutation of all samples. If the data change during an epoch, the unused samples and the new samples
are joined and permuted again. Checkpoints store these permutations as JSON.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from beit3_ds.data.order.permutation import order_permutation

_BLOCK = 128
"""Number of samples per block of a `SourceSubset`. To find one sample, the whole block is computed."""
_CHUNK = 1 << 20
_GONE = 1 << 40
"""Sample numbers of sources in the config are below this value. Each removed source, which is no longer in the config,
has a reserved range of sample numbers at or above this value. The length of a reserved range is also this value."""

Bounds = Callable[[int], tuple[int, int]]
"""Maps a source's id to the source's first sample number in the stream, and to one past the last."""


class RemainingSamples(Protocol):
    """Interface of an ordered set of samples. An example is the set of a stream's samples that are still unused in an
    epoch.
    """

    def __len__(self) -> int:
        """Returns the number of samples in the set."""

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Converts indices in this set to sample numbers of the stream; argument and result are (n,) int64."""

    def add_to(self, nodes: list[Any]) -> int:
        """Appends the JSON description of this set to `nodes`, after the descriptions of the sets from which this set
        is made.

        Returns:
            Index in `nodes` of this set's description, which is the last element.
        """


@dataclass(frozen=True)
class Range:
    """Represents the samples `first` to `last` - 1 of one source."""

    source: int
    """Id of the source."""
    first: int
    last: int
    start: int
    """Index of the source's first sample, counted over all samples of the stream."""

    def __len__(self) -> int:
        """Returns the number of samples in the range."""
        return self.last - self.first

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Converts indices in this range to sample numbers of the stream; argument and result are (n,) int64."""
        return places + (self.start + self.first)

    def add_to(self, nodes: list[Any]) -> int:
        """Appends the JSON description of this range to `nodes`; returns the index of the description."""
        nodes.append(["range", self.source, self.first, self.last])
        return len(nodes) - 1


class Joined:
    """Represents several sets of samples one after another, as one set."""

    def __init__(self, parts: Sequence[RemainingSamples]) -> None:
        """Stores the sets, which must be disjoint."""
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        """Returns the number of samples in all sets."""
        return int(self._ends[-1])

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Converts indices in this set to sample numbers of the stream; argument and result are (n,) int64."""
        numbers = np.empty_like(places)
        owners = np.searchsorted(self._ends, places, side="right")
        for owner in np.unique(owners):
            here, part = owners == owner, self._parts[owner]
            numbers[here] = part(places[here] - (int(self._ends[owner]) - len(part)))
        return numbers

    def add_to(self, nodes: list[Any]) -> int:
        """Calls `add_to(nodes)` of each joined set, and then appends the JSON description of the joined result to
        `nodes`.

        Returns:
            Index in `nodes` of the last description.
        """
        nodes.append(["joined", [part.add_to(nodes) for part in self._parts]])
        return len(nodes) - 1


@dataclass(frozen=True)
class Rest:
    """Represents the rest of the set `whole`: all samples except the first `taken` ones of a permutation."""

    whole: RemainingSamples
    seed: int
    key: tuple[str | int, ...]
    """Key of the permutation; `seed` and this key select a permutation of all samples in `whole`."""
    taken: int

    def __len__(self) -> int:
        """Returns the number of remaining samples."""
        return len(self.whole) - self.taken

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Converts indices among the remaining samples to sample numbers of the stream.

        Argument and result are (n,) int64.
        """
        return self.whole(order_permutation(self.seed, self.key, len(self.whole))(places + self.taken))

    def add_to(self, nodes: list[Any]) -> int:
        """Calls `whole.add_to(nodes)`, and then appends the JSON description of this set to `nodes`.

        Returns:
            Index in `nodes` of this set's description, which is the last element.
        """
        nodes.append(["rest", self.whole.add_to(nodes), self.seed, list(self.key), self.taken])
        return len(nodes) - 1


@dataclass(frozen=True)
class SourceSubset:
    """Represents the samples of the set `whole` that belong to the given sources, in the order of `whole`.

    The constructor computes all sample numbers of `whole` once. This takes 20 seconds for 100 million samples.
    """

    whole: RemainingSamples
    sources: tuple[int, ...]
    """Ids of the sources whose samples are kept."""
    bounds: tuple[tuple[int, int], ...]
    """First sample number of each kept source, and one past its last sample number."""
    _counts: NDArray[np.int64] = field(init=False)
    """Entry i is the number of kept samples among the first i * _BLOCK samples of `whole`; the last entry is the total.
    """

    def __post_init__(self) -> None:
        counts = [0]
        for start in range(0, len(self.whole), _CHUNK):
            kept = self._is_kept(self.whole(np.arange(start, min(start + _CHUNK, len(self.whole)))))
            counts += np.add.reduceat(kept, np.arange(0, len(kept), _BLOCK), dtype=np.int64).tolist()
        object.__setattr__(self, "_counts", np.cumsum(counts, dtype=np.int64))

    def __len__(self) -> int:
        """Returns the number of kept samples."""
        return int(self._counts[-1])

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Converts indices in this subset to sample numbers of the stream; argument and result are (n,) int64."""
        blocks = np.searchsorted(self._counts, places, side="right") - 1
        wanted, owners = np.unique(blocks, return_inverse=True)
        inside = wanted[:, None] * _BLOCK + np.arange(_BLOCK)  # all indices of these blocks in the whole set
        candidates = self.whole(np.minimum(inside, len(self.whole) - 1).ravel()).reshape(inside.shape)
        kept = self._is_kept(candidates) & (inside < len(self.whole))
        ordinals = np.cumsum(kept, axis=1)[owners] == (places - self._counts[blocks] + 1)[:, None]
        return candidates[owners, ordinals.argmax(axis=1)]

    def add_to(self, nodes: list[Any]) -> int:
        """Calls `whole.add_to(nodes)`, and then appends the JSON description of this subset to `nodes`.

        Returns:
            Index in `nodes` of this subset's description, which is the last element.
        """
        nodes.append(["only", self.whole.add_to(nodes), list(self.sources)])
        return len(nodes) - 1

    def _is_kept(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        kept = np.zeros(numbers.shape, dtype=bool)
        for first, last in self.bounds:
            kept |= (numbers >= first) & (numbers < last)
        return kept


def to_nodes(remaining: RemainingSamples) -> list[Any]:
    """Returns the JSON description of a set of samples, preceded by the descriptions of all sets of which it is formed.

    So the last description is that of the set itself.
    """
    nodes: list[Any] = []
    remaining.add_to(nodes)
    return nodes


def from_nodes(nodes: Sequence[Any], bounds: Bounds) -> RemainingSamples:
    """Rebuilds a set of samples from its JSON descriptions, even if the sources' samples are now numbered differently.

    Args:
        nodes: result of `to_nodes`.
        bounds: function that takes the id of a source. The function returns the source's current first sample number,
            and its current last sample number plus one; for a removed source, the result of `gone_bounds`.
    """
    built: list[RemainingSamples] = []
    for kind, *values in nodes:
        match kind:
            case "range":
                source, first, last = values
                built.append(Range(source, first, last, bounds(source)[0]))
            case "joined":
                built.append(Joined([built[number] for number in values[0]]))
            case "rest":
                number, seed, key, taken = values
                built.append(Rest(built[number], seed, tuple(key), taken))
            case "only":
                number, sources = values
                built.append(SourceSubset(built[number], tuple(sources), tuple(bounds(source) for source in sources)))
            case _:
                raise AssertionError(f"unknown kind of set: {kind!r}")
    return built[-1]


def gone_bounds(source: int) -> tuple[int, int]:
    """Returns the range of sample numbers that is reserved for a removed source, as (first, last + 1).

    Args:
        source: id of the removed source.
    """
    return (source + 1) * _GONE, (source + 2) * _GONE
