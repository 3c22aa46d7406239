"""Gathers evaluation results, one row per sample, from all ranks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from beit3_ds.config import ConfigError
from beit3_ds.parallel import Mesh

Rows = Tensor | Sequence[str]
"""Values with one row per sample: a tensor (samples, ...), or a sequence of strings."""


class SampleResults:
    """Collects one row of results per sample; a sample is identified by its index in the split.

    Every rank adds the rows of its own batches. `gather` returns all rows on the main rank, sorted by index. Metrics
    computed from sorted rows are bitwise equal on any number of ranks.
    """

    def __init__(self) -> None:
        """Creates an empty collection of results."""
        self._indices: list[Tensor] = []
        self._rows: dict[str, list[Rows]] = {}

    def add(self, indices: Tensor, **rows: Rows) -> None:
        """Adds the rows of a batch.

        Args:
            indices: index of each sample in its split (`SampleKey.index`), (samples,) int64.
            rows: values with one row per sample, by name; every call must pass equal names.
        """
        assert all(len(values) == len(indices) for values in rows.values()), "one row per sample"
        self._indices.append(indices.cpu())
        for name, values in rows.items():
            self._rows.setdefault(name, []).append(values.cpu() if isinstance(values, Tensor) else list(values))

    def gather(self, mesh: Mesh) -> "GatheredResults | None":
        """Returns the rows of all ranks on the main rank, and None on other ranks. All ranks must call this method.

        Each sample must come from exactly one rank; in a tensor-parallel group, only one rank adds rows. Every rank
        sends its rows once to the main rank, over gloo.
        """
        parts = mesh.host.collect([torch.cat(self._indices) if self._indices else None, self._packed()])
        if parts is None:
            return None
        filled = [(indices, rows) for indices, rows in parts if indices is not None]
        indices = torch.cat([indices for indices, _ in filled]) if filled else torch.empty(0, dtype=torch.int64)
        order = indices.argsort(stable=True)
        names = filled[0][1] if filled else ()
        rows = {name: _reorder([part[name] for _, part in filled], order) for name in names}
        return GatheredResults(indices[order], rows)

    def _packed(self) -> dict[str, Rows]:
        return {name: _join(parts) for name, parts in self._rows.items()}


class GatheredResults:
    """Holds the results of all samples, sorted by the samples' index in the split.

    Attributes:
        indices: index of each sample in its split, ascending, (samples,) int64.
    """

    def __init__(self, indices: Tensor, rows: Mapping[str, Rows]) -> None:
        """Stores the rows after checking that no sample has two rows.

        Args:
            indices: index of each sample in its split, ascending, (samples,) int64.
            rows: values with one row per sample, by name, in the order of `indices`.

        Raises:
            ConfigError: if a sample was evaluated twice.
        """
        repeated = indices[1:][indices[1:] == indices[:-1]]
        if len(repeated):
            raise ConfigError(
                f"evaluation: {len(repeated)} samples were evaluated twice, the first of them number "
                f"{int(repeated[0])}; their scores would count twice. A task must add each sample on one rank only."
            )
        self.indices, self._rows = indices, dict(rows)

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.indices)

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor added under `name`, (samples, ...); an empty tensor (0,) if there are no samples."""
        found = self._rows.get(name, torch.empty(0))
        assert isinstance(found, Tensor), f"{name} holds strings"
        return found

    def strings(self, name: str) -> list[str]:
        """Returns the strings added under `name`, one per sample."""
        found = self._rows.get(name, ())
        assert not isinstance(found, Tensor), f"{name} is a tensor"
        return list(found)


def _join(parts: Sequence[Rows]) -> Rows:
    if isinstance(parts[0], Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    return [value for part in parts for value in part]


def _reorder(parts: Sequence[Rows], order: Tensor) -> Rows:
    joined = _join(parts)
    return joined[order] if isinstance(joined, Tensor) else [joined[index] for index in order.tolist()]
