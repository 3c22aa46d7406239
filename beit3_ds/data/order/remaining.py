"""The samples that an epoch has left, as sets that are computed from its shuffles and never listed.

While the data stay the same, an epoch is one shuffle of all samples. When they change during an epoch, the rest of the
shuffle is joined with the new samples and shuffled again. So a set is a formula over earlier shuffles. Its size does
not depend on the number of samples, and a checkpoint stores it as JSON.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from beit3_ds.data.order.permutation import order_permutation

_BLOCK = 128
"""Samples that are counted together; finding one sample computes this many."""
_CHUNK = 1 << 20
_GONE = 1 << 40
"""First number for samples of removed sources, and count of numbers per removed source."""

Bounds = Callable[[int], tuple[int, int]]
"""Returns, for a source's id, the first number of its samples in the stream and one past the last."""


class RemainingSamples(Protocol):
    """A set of samples, numbered from 0."""

    def __len__(self) -> int:
        """Samples of the set."""

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the numbers in the stream of the samples at places of the set; both (n,) int64."""

    def add_to(self, nodes: list[Any]) -> int:
        """Appends the set to a list of JSON nodes, after its parts; returns the number of its own node."""


@dataclass(frozen=True)
class Range:
    """The samples [first, last) of one source."""

    source: int
    """Id of the source."""
    first: int
    last: int
    start: int
    """Number of the source's sample 0 in the stream."""

    def __len__(self) -> int:
        """Samples of the set."""
        return self.last - self.first

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `RemainingSamples`."""
        return places + (self.start + self.first)

    def add_to(self, nodes: list[Any]) -> int:
        """See `RemainingSamples`."""
        nodes.append(["range", self.source, self.first, self.last])
        return len(nodes) - 1


class Joined:
    """Several sets, one after the other."""

    def __init__(self, parts: Sequence[RemainingSamples]) -> None:
        """Takes the parts, none of which share a sample."""
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        """Returns the number of samples of all parts."""
        return int(self._ends[-1])

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `RemainingSamples`."""
        numbers = np.empty_like(places)
        owners = np.searchsorted(self._ends, places, side="right")
        for owner in np.unique(owners):
            here, part = owners == owner, self._parts[owner]
            numbers[here] = part(places[here] - (int(self._ends[owner]) - len(part)))
        return numbers

    def add_to(self, nodes: list[Any]) -> int:
        """See `RemainingSamples`."""
        nodes.append(["joined", [part.add_to(nodes) for part in self._parts]])
        return len(nodes) - 1


@dataclass(frozen=True)
class Rest:
    """The rest of a shuffled set after its first samples were taken."""

    whole: RemainingSamples
    seed: int
    key: tuple[str | int, ...]
    """Key, beside the seed, of the permutation that shuffled the set."""
    taken: int

    def __len__(self) -> int:
        """Returns the number of samples that are left."""
        return len(self.whole) - self.taken

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `RemainingSamples`."""
        return self.whole(order_permutation(self.seed, self.key, len(self.whole))(places + self.taken))

    def add_to(self, nodes: list[Any]) -> int:
        """See `RemainingSamples`."""
        nodes.append(["rest", self.whole.add_to(nodes), self.seed, list(self.key), self.taken])
        return len(nodes) - 1


@dataclass(frozen=True)
class Only:
    """The samples of a set that belong to some of its sources.

    Building it computes the whole set once to count samples in blocks: about 20 seconds for 100 million samples.
    """

    whole: RemainingSamples
    sources: tuple[int, ...]
    """Ids of the sources that stay."""
    bounds: tuple[tuple[int, int], ...]
    """Range of the numbers of their samples in the stream, per source."""
    _counts: NDArray[np.int64] = field(init=False)
    """Samples that stay in all blocks before each block, and in all blocks."""

    def __post_init__(self) -> None:
        counts = [0]
        for start in range(0, len(self.whole), _CHUNK):
            stays = self._stays(self.whole(np.arange(start, min(start + _CHUNK, len(self.whole)))))
            counts += np.add.reduceat(stays, np.arange(0, len(stays), _BLOCK), dtype=np.int64).tolist()
        object.__setattr__(self, "_counts", np.cumsum(counts, dtype=np.int64))

    def __len__(self) -> int:
        """Returns the number of samples that stay."""
        return int(self._counts[-1])

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `RemainingSamples`."""
        blocks = np.searchsorted(self._counts, places, side="right") - 1
        wanted, owners = np.unique(blocks, return_inverse=True)
        inside = wanted[:, None] * _BLOCK + np.arange(_BLOCK)  # the places of whole blocks in the whole set
        candidates = self.whole(np.minimum(inside, len(self.whole) - 1).ravel()).reshape(inside.shape)
        stays = self._stays(candidates) & (inside < len(self.whole))
        ordinals = np.cumsum(stays, axis=1)[owners] == (places - self._counts[blocks] + 1)[:, None]
        return candidates[owners, ordinals.argmax(axis=1)]

    def add_to(self, nodes: list[Any]) -> int:
        """See `RemainingSamples`."""
        nodes.append(["only", self.whole.add_to(nodes), list(self.sources)])
        return len(nodes) - 1

    def _stays(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        stays = np.zeros(numbers.shape, dtype=bool)
        for first, last in self.bounds:
            stays |= (numbers >= first) & (numbers < last)
        return stays


def to_nodes(remaining: RemainingSamples) -> list[Any]:
    """Returns the set as a flat list of JSON nodes, with the set itself as the last one."""
    nodes: list[Any] = []
    remaining.add_to(nodes)
    return nodes


def from_nodes(nodes: Sequence[Any], bounds: Bounds) -> RemainingSamples:
    """Rebuilds a set from the nodes of `to_nodes`, in a stream whose sources may be numbered differently now.

    Args:
        nodes: result of `to_nodes`.
        bounds: ranges of the sources' numbers in the stream now; `gone_bounds` for removed sources.
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
                built.append(Only(built[number], tuple(sources), tuple(bounds(source) for source in sources)))
            case _:
                raise AssertionError(f"no set of samples is called {kind!r}")
    return built[-1]


def gone_bounds(source: int) -> tuple[int, int]:
    """Returns a range of numbers that no sample of the stream has, for the samples of a removed source."""
    return (source + 1) * _GONE, (source + 2) * _GONE
