"""Counts the distinct records that a run could not read, over all epochs, ranks and restarts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from beit3_ds.batch import StepBatch
from beit3_ds.config import ConfigError
from beit3_ds.parallel import Mesh
from beit3_ds.parallel.host_group import HostGroup
from beit3_ds.printing import printable
from beit3_ds.training.loss import count_terms

_LONGEST_LINE = 4000
BROKEN_RECORDS = "broken_records"
"""Key in `Index.data` under which a checkpoint stores the broken records."""


class BrokenRecords:
    """Collects broken records from the ranks of a group, and raises an error if there are too many.

    Records are identified by their file and their name in the file. A record that is read again, in another epoch, on
    another rank or after a restart, counts once.
    """

    def __init__(self, limit: int, group: HostGroup, known: Mapping[str, str] | None = None) -> None:
        """Starts with the broken records of a checkpoint, if given.

        Args:
            limit: maximum number of distinct broken records (`data.max_broken_records`).
            group: ranks that share their broken records; each reads different records.
            known: records found before the restart, as error descriptions by record name.
        """
        self._limit, self._host = limit, group
        self._lines = dict(known or {})

    @property
    def total(self) -> int:
        """Returns the number of distinct broken records found so far on all ranks."""
        return len(self._lines)

    def state(self) -> dict[str, str]:
        """Returns the error description of each broken record, by record name, to store in a checkpoint."""
        return dict(self._lines)

    def unknown(self, met: Mapping[str, str]) -> dict[str, str]:
        """Returns the entries of `met` for records that no rank has found before.

        Args:
            met: broken records that this rank has just found, as error descriptions by record name.
        """
        return {name: line for name, line in met.items() if name not in self._lines}

    def add(self, new: Mapping[str, str], where: str) -> list[str]:
        """Shares newly found broken records with all ranks of the group, which must all call this method.

        Args:
            new: result of `unknown` on this rank.
            where: time or place for the error message, such as "by step 3".

        Returns:
            Descriptions of the records that no rank had found before, sorted by name, equal on all ranks.

        Raises:
            ConfigError: on all ranks, if the total exceeds the limit; the message lists all records.
        """
        found: dict[str, str] = {}
        for other in self._host.gather(dict(new)):
            found |= {name: line for name, line in other.items() if name not in found}
        self._lines |= found
        if self.total > self._limit:
            raise ConfigError(
                f"data: {self.total} broken records {where}, more than data.max_broken_records={self._limit}. Repair "
                "or remove them, or raise the limit:",
                *self._lines.values(),
            )
        return [found[name] for name in sorted(found)]


class StepCounts:
    """Computes the number of predictions per loss term in a step, summed over all data-parallel ranks. This needs no
    forward pass.
    """

    def __init__(self, records: BrokenRecords, mesh: Mesh) -> None:
        self.records, self._mesh = records, mesh

    def agree(self, step_batch: StepBatch) -> tuple[Tensor, list[str]]:
        """Sums the number of predictions per loss term over all data-parallel ranks, and shares new broken records.

        Each rank sends K + 1 integers for K loss terms: the count of each term, and the number of new broken records.
        If any rank has new broken records, their descriptions are also sent.

        Returns:
            Number of predictions per term over all data-parallel ranks, (terms,) int64, and the description of each
            broken record that no rank had found before.

        Raises:
            ConfigError: on all ranks at the same step, if there are too many broken records.
        """
        new = self.records.unknown(step_batch.broken_records)
        own = torch.cat([count_terms(step_batch), torch.tensor([len(new)])])
        *counts, num_new = self._mesh.data_host.sum(own).tolist()
        lines = self.records.add(new, f"by step {step_batch.step + 1}") if num_new else []
        return torch.tensor(counts), lines


def records_from(data: Mapping[str, Any]) -> dict[str, str]:
    """Returns the broken records stored in a checkpoint's `Index.data`, as error descriptions by record name; empty for
    checkpoints of older versions.

    Raises:
        ConfigError: if the stored entry is not a mapping of record names to descriptions. This happens if the
            checkpoint was edited.
    """
    records = data.get(BROKEN_RECORDS, {})
    if not (isinstance(records, Mapping) and all(isinstance(line, str) for line in records.values())):
        raise ConfigError(
            f"the checkpoint's list of broken records is damaged: {str(records)[:80]!r}. Remove this checkpoint, and "
            "the same command resumes from the one before."
        )
    return {name: printable(line, _LONGEST_LINE) for name, line in records.items()}


def format_new_records(lines: Sequence[str], total: int, limit: int) -> list[str]:
    """Formats one log line per newly found broken record, with the count of records so far and the limit.

    Args:
        lines: descriptions of the new broken records.
        total: number of broken records so far, including the new ones.
        limit: maximum number of broken records (`data.max_broken_records`).
    """
    first = total - len(lines)
    return [f"left out broken record {first + i + 1} of at most {limit}: {line}" for i, line in enumerate(lines)]
