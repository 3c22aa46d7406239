"""Computes the samples that remain in an epoch from the epoch's permutations, without listing them.

An epoch is one permutation of all samples. If the data change during an epoch, its rest is joined with the new samples
and permuted again. So a few permutations describe the remaining samples, and checkpoints store them as JSON.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from beit3_ds.data.order.permutation import order_permutation

_BLOCK = 128
"""Number of samples per block of a `SourceSubset`, which computes a whole block to find one sample."""
_CHUNK = 1 << 20
_GONE = 1 << 40
"""Smallest sample number that a removed source can have, and count of the numbers reserved per removed source."""

Bounds = Callable[[int], tuple[int, int]]
"""Maps the id of a source to its first sample number and to one past its last sample number."""


class RemainingSamples(Protocol):
    """Declares the interface of an ordered set of a stream's samples; a place is an index in this order."""

    def __len__(self) -> int:
        """Returns the number of samples in the set."""

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the numbers, in the stream, of the samples at `places`, indices into the set, (n,) int64."""

    def add_to(self, nodes: list[Any]) -> int:
        """Appends the JSON nodes of this set's parts and of this set; returns the index of the last node."""


@dataclass(frozen=True)
class Range:
    """Describes the samples `first` to `last` - 1 of one source."""

    source: int
    """Id of the source."""
    first: int
    last: int
    start: int
    """Number in the stream of the source's first sample."""

    def __len__(self) -> int:
        """Returns the number of samples in the range."""
        return self.last - self.first

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the numbers, in the stream, of the samples at `places`, indices into the range, (n,) int64."""
        return places + (self.start + self.first)

    def add_to(self, nodes: list[Any]) -> int:
        """Appends the JSON node of the range to `nodes`; returns the node's index."""
        nodes.append(["range", self.source, self.first, self.last])
        return len(nodes) - 1


class Joined:
    """Concatenates several sets of samples."""

    def __init__(self, parts: Sequence[RemainingSamples]) -> None:
        """Stores the sets, which must have no sample in common."""
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        """Returns the number of samples in all sets."""
        return int(self._ends[-1])

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the numbers of the samples at `places`, indices into the concatenated parts, (n,) int64."""
        numbers = np.empty_like(places)
        owners = np.searchsorted(self._ends, places, side="right")
        for owner in np.unique(owners):
            here, part = owners == owner, self._parts[owner]
            numbers[here] = part(places[here] - (int(self._ends[owner]) - len(part)))
        return numbers

    def add_to(self, nodes: list[Any]) -> int:
        """Appends the JSON nodes of the sets and of their concatenation; returns the index of the last node."""
        nodes.append(["joined", [part.add_to(nodes) for part in self._parts]])
        return len(nodes) - 1


@dataclass(frozen=True)
class Rest:
    """Describes the samples that remain of a permuted set after its first `taken` samples."""

    whole: RemainingSamples
    seed: int
    key: tuple[str | int, ...]
    """Key that, with the seed, selects the permutation of the whole set."""
    taken: int

    def __len__(self) -> int:
        """Returns the number of samples that remain."""
        return len(self.whole) - self.taken

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the numbers of the samples at `places`, indices into the remaining samples, (n,) int64."""
        return self.whole(order_permutation(self.seed, self.key, len(self.whole))(places + self.taken))

    def add_to(self, nodes: list[Any]) -> int:
        """Appends the JSON nodes of the whole set and of the remaining samples; returns the index of the last node."""
        nodes.append(["rest", self.whole.add_to(nodes), self.seed, list(self.key), self.taken])
        return len(nodes) - 1


@dataclass(frozen=True)
class SourceSubset:
    """Describes the samples of a set that belong to some of its sources, in the order of the set.

    The constructor computes the whole set once: 20 seconds for 100 million samples.
    """

    whole: RemainingSamples
    sources: tuple[int, ...]
    """Ids of the sources whose samples are kept."""
    bounds: tuple[tuple[int, int], ...]
    """Range of each kept source's sample numbers: the first number, and one past the last."""
    _counts: NDArray[np.int64] = field(init=False)
    """Number of kept samples before each block, and the total number."""

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
        """Returns the numbers of the samples at `places`, indices into the kept samples, (n,) int64."""
        blocks = np.searchsorted(self._counts, places, side="right") - 1
        wanted, owners = np.unique(blocks, return_inverse=True)
        inside = wanted[:, None] * _BLOCK + np.arange(_BLOCK)  # all indices of these blocks in the whole set
        candidates = self.whole(np.minimum(inside, len(self.whole) - 1).ravel()).reshape(inside.shape)
        kept = self._is_kept(candidates) & (inside < len(self.whole))
        ordinals = np.cumsum(kept, axis=1)[owners] == (places - self._counts[blocks] + 1)[:, None]
        return candidates[owners, ordinals.argmax(axis=1)]

    def add_to(self, nodes: list[Any]) -> int:
        """Appends the JSON nodes of the whole set and of this subset; returns the index of the last node."""
        nodes.append(["only", self.whole.add_to(nodes), list(self.sources)])
        return len(nodes) - 1

    def _is_kept(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        kept = np.zeros(numbers.shape, dtype=bool)
        for first, last in self.bounds:
            kept |= (numbers >= first) & (numbers < last)
        return kept


def to_nodes(remaining: RemainingSamples) -> list[Any]:
    """Returns a flat list of JSON nodes that describes a set; the last node is the set itself."""
    nodes: list[Any] = []
    remaining.add_to(nodes)
    return nodes


def from_nodes(nodes: Sequence[Any], bounds: Bounds) -> RemainingSamples:
    """Rebuilds a set from its JSON nodes, even if the sources' sample numbers have changed since.

    Args:
        nodes: result of `to_nodes`.
        bounds: returns the current range of a source's sample numbers, and `gone_bounds` for a removed source.
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
    """Returns the range of sample numbers of a removed source; no source of the stream has these numbers."""
    return (source + 1) * _GONE, (source + 2) * _GONE
