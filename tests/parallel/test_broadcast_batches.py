"""Tests that all ranks of a model copy get the batches that some of them read, or the same error."""

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal

import pytest
import torch.distributed as dist

from beit3_ds.config import ConfigError, ParallelConfig
from beit3_ds.parallel import BroadcastBatches, Mesh, build_mesh
from beit3_ds.storage_error import StorageError
from tests.ranks import run_ranks

Fault = Literal["", "differs", "storage", "config", "short"]


@dataclass(frozen=True)
class Item:
    number: int
    pixels: str

    def without_pixels(self) -> "Item":
        return replace(self, pixels="")

    def fingerprint(self) -> str:
        return str(self.number)

    def as_value(self) -> Any:
        return {"number": self.number, "pixels": self.pixels}

    @classmethod
    def from_value(cls, value: Any) -> "Item":
        return cls(**value)


def read(mesh: Mesh, fault: Fault) -> Any:
    """Yields two items for this rank's stage; on the last stage, the second item may be faulty or missing."""
    view = "model" if mesh.pipeline.is_first else "tokenizer"
    yield Item(0, view)
    if not mesh.pipeline.is_first:
        if fault == "storage":
            raise StorageError("disk is gone")
        if fault == "config":
            raise ConfigError("too many broken records")
        if fault == "short":
            return
    yield Item(7 if fault == "differs" and not mesh.pipeline.is_first else 1, view)


def iterate(faults: list[Fault]) -> list[Any]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = build_mesh(ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2))
    results: list[Any] = []
    for fault in faults:
        found: list[Any] = []
        try:
            for item in BroadcastBatches(read(mesh, fault), mesh, Item):
                found.append((item.number, item.pixels))
        except (ConfigError, StorageError) as error:
            found.append((type(error).__name__, str(error)[:40]))
        results.append(found)
    mesh.close()
    return results


def test_every_rank_gets_its_stages_view_or_the_same_error() -> None:
    """Checks two stages of two ranks each, with and without faults.

    Ranks 0 and 1 are the first stage, and rank 0 reads. Ranks 2 and 3 are the last stage.
    """
    ranks = run_ranks(iterate, 4, ["", "short", "differs", "storage", "config"])
    for rank, (whole, short, differing, storage, config) in enumerate(ranks):
        view = "model" if rank < 2 else "tokenizer"
        assert whole == [(0, view), (1, view)]
        assert short == [(0, view)]  # all ranks stop when one has no more items
        for found, error, words in (
            (differing, "ConfigError", "the first and the last stage"),
            (storage, "StorageError", "disk is gone"),
            (config, "ConfigError", "too many broken records"),
        ):
            assert found[0] == (0, view) and found[1][0] == error and words in found[1][1] and len(found) == 2


def test_a_lone_rank_iterates_over_its_own_items() -> None:
    items = [Item(0, "both"), Item(1, "both")]
    assert list(BroadcastBatches(items, Mesh(), Item)) == items
    with pytest.raises(StorageError):
        list(BroadcastBatches(_fail(), Mesh(), Item))


def _fail() -> Any:
    raise StorageError("disk is gone")
    yield
