"""Computes the samples that remain in an epoch from its shuffles, without listing them.

While the data stay the same, an epoch is one shuffle of all samples. If they change during an epoch, the rest of the
shuffle is joined with the new samples and shuffled again. So a set is a formula over earlier shuffles: its size does
not depend on the number of samples, and a checkpoint stores it as JSON.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from beit3_ds.data.order.permutation import order_permutation

_BLOCK = 128
"""Samples per block of a `SourceSubset`; finding one sample computes a whole block."""
_CHUNK = 1 << 20
_GONE = 1 << 40
"""First sample number that a removed source may get, and how many numbers are reserved for each."""

Bounds = Callable[[int], tuple[int, int]]
"""Maps the id of a source to the range of its sample numbers in the stream: the first, and one past the last."""


class RemainingSamples(Protocol):
    """Defines an ordered set of samples; places in it count from 0."""

    def __len__(self) -> int:
        """Returns the number of samples in the set."""

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Maps places in the set to sample numbers in the stream; both (n,) int64."""

    def add_to(self, nodes: list[Any]) -> int:
        """Appends the set to a list of JSON nodes, after the sets that it is made of; returns the index of its node."""


@dataclass(frozen=True)
class Range:
    """Holds the samples [first, last) of one source."""

    source: int
    """Id of the source."""
    first: int
    last: int
    start: int
    """Number of the source's sample 0 in the stream."""

    def __len__(self) -> int:
        """Returns the number of samples in the set."""
        return self.last - self.first

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Maps places in the set to sample numbers in the stream; both (n,) int64."""
        return places + (self.start + self.first)

    def add_to(self, nodes: list[Any]) -> int:
        """Appends the set to a list of JSON nodes; returns the index of its node."""
        nodes.append(["range", self.source, self.first, self.last])
        return len(nodes) - 1


class Joined:
    """Joins several sets, one after the other."""

    def __init__(self, parts: Sequence[RemainingSamples]) -> None:
        """Joins sets that share no sample."""
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        """Returns the number of samples in all sets."""
        return int(self._ends[-1])

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Maps places in the set to sample numbers in the stream; both (n,) int64."""
        numbers = np.empty_like(places)
        owners = np.searchsorted(self._ends, places, side="right")
        for owner in np.unique(owners):
            here, part = owners == owner, self._parts[owner]
            numbers[here] = part(places[here] - (int(self._ends[owner]) - len(part)))
        return numbers

    def add_to(self, nodes: list[Any]) -> int:
        """Appends the set to a list of JSON nodes; returns the index of its node."""
        nodes.append(["joined", [part.add_to(nodes) for part in self._parts]])
        return len(nodes) - 1


@dataclass(frozen=True)
class Rest:
    """Holds the samples that remain of a shuffled set after its first samples were taken."""

    whole: RemainingSamples
    seed: int
    key: tuple[str | int, ...]
    """Key that selects, together with the seed, the permutation that shuffled the set."""
    taken: int

    def __len__(self) -> int:
        """Returns the number of samples that remain."""
        return len(self.whole) - self.taken

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Maps places in the set to sample numbers in the stream; both (n,) int64."""
        return self.whole(order_permutation(self.seed, self.key, len(self.whole))(places + self.taken))

    def add_to(self, nodes: list[Any]) -> int:
        """Appends the set to a list of JSON nodes; returns the index of its node."""
        nodes.append(["rest", self.whole.add_to(nodes), self.seed, list(self.key), self.taken])
        return len(nodes) - 1


@dataclass(frozen=True)
class SourceSubset:
    """Holds the samples of a set that belong to some of its sources.

    The constructor computes the whole set once, to count samples per block: 20 seconds for 100 million samples.
    """

    whole: RemainingSamples
    sources: tuple[int, ...]
    """Ids of the sources that are kept."""
    bounds: tuple[tuple[int, int], ...]
    """Range of the sample numbers in the stream of each kept source."""
    _counts: NDArray[np.int64] = field(init=False)
    """Kept samples before each block, and the total."""

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
        """Maps places in the set to sample numbers in the stream; both (n,) int64."""
        blocks = np.searchsorted(self._counts, places, side="right") - 1
        wanted, owners = np.unique(blocks, return_inverse=True)
        inside = wanted[:, None] * _BLOCK + np.arange(_BLOCK)  # places of whole blocks in the whole set
        candidates = self.whole(np.minimum(inside, len(self.whole) - 1).ravel()).reshape(inside.shape)
        kept = self._is_kept(candidates) & (inside < len(self.whole))
        ordinals = np.cumsum(kept, axis=1)[owners] == (places - self._counts[blocks] + 1)[:, None]
        return candidates[owners, ordinals.argmax(axis=1)]

    def add_to(self, nodes: list[Any]) -> int:
        """Appends the set to a list of JSON nodes; returns the index of its node."""
        nodes.append(["only", self.whole.add_to(nodes), list(self.sources)])
        return len(nodes) - 1

    def _is_kept(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        kept = np.zeros(numbers.shape, dtype=bool)
        for first, last in self.bounds:
            kept |= (numbers >= first) & (numbers < last)
        return kept


def to_nodes(remaining: RemainingSamples) -> list[Any]:
    """Returns the set as a flat list of JSON nodes; the last node is the set itself."""
    nodes: list[Any] = []
    remaining.add_to(nodes)
    return nodes


def from_nodes(nodes: Sequence[Any], bounds: Bounds) -> RemainingSamples:
    """Rebuilds a set from the nodes of `to_nodes`; the sources may have other sample numbers now.

    Args:
        nodes: result of `to_nodes`.
        bounds: range of each source's sample numbers in the stream now; `gone_bounds` for removed sources.
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
    """Returns a range of sample numbers for a removed source; no sample of the stream has one of them."""
    return (source + 1) * _GONE, (source + 2) * _GONE
