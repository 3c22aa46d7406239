"""Tests coordinates on the mesh, and the broadcast of samples that only some ranks read."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.config import ConfigError, ParallelConfig, RankCoords
from beit3_ds.parallel import BroadcastBatches, Mesh
from tests.ranks import run_ranks


def build_mesh(parallel: ParallelConfig) -> Mesh:
    from beit3_ds.runtime.process_group import init_process_group

    return init_process_group(parallel)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_every_rank_has_a_place_of_its_own(pipeline: int, data: int, tensor: int) -> None:
    parallel = ParallelConfig(pipeline_parallel_size=pipeline, tensor_parallel_size=tensor)
    world_size = pipeline * data * tensor
    assert parallel.data_parallel_size(world_size) == data
    all_coords = [parallel.rank_coords(rank, world_size) for rank in range(world_size)]
    assert all_coords == [RankCoords(p, d, t) for p in range(pipeline) for d in range(data) for t in range(tensor)]


def measure_sums() -> tuple[RankCoords, list[float]]:
    import torch

    mesh = build_mesh(ParallelConfig(pipeline_parallel_size=2, tensor_parallel_size=2))
    digit = torch.tensor(10.0 ** (4 * mesh.pipeline.rank + 2 * mesh.data_parallel_rank + mesh.tensor.rank))
    sums = [mesh.sum_over_data(digit), mesh.sum_over_model(digit), mesh.tensor.all_reduce(digit.clone())]
    hosts = (mesh.host, mesh.data_host, mesh.tensor.host, mesh.pipeline.host)
    sums += [group.sum(digit) for group in hosts]
    sums.append(mesh.pipeline.host.broadcast(digit, src=-1))
    assert mesh.host.rank == torch.distributed.get_rank()
    mesh.close()  # rank 0 holds the store, which other ranks still use
    return mesh.coords, [float(value) for value in sums]


def test_groups_run_along_their_axes() -> None:
    """Checks the ranks of each group: every rank adds a different digit, so a sum shows who took part."""
    results = run_ranks(measure_sums, 8)
    assert [coords for coords, _ in results] == [RankCoords(p, d, t) for p in (0, 1) for d in (0, 1) for t in (0, 1)]
    for coords, (data, model, tensor, *of_hosts, last) in results:
        p, d, t = coords
        assert data == sum(10 ** (4 * p + 2 * i + t) for i in (0, 1))
        assert model == sum(10 ** (4 * i + 2 * d + j) for i in (0, 1) for j in (0, 1))
        assert tensor == sum(10 ** (4 * p + 2 * d + i) for i in (0, 1))
        stages = sum(10 ** (4 * i + 2 * d + t) for i in (0, 1))
        assert of_hosts == [
            sum(10 ** (4 * i + 2 * j + k) for i in (0, 1) for j in (0, 1) for k in (0, 1)),
            data,
            tensor,
            stages,
        ]
        assert last == 10 ** (4 + 2 * d + t)


def gather_rows() -> tuple[list[int], list[tuple[int, ...]]]:
    """Gathers over data-parallel ranks: rank + 1 rows, rows on rank 1 only, and no rows; returns values and shapes."""
    mesh = build_mesh(ParallelConfig(tensor_parallel_size=2))
    rank = mesh.data_parallel_rank
    found = mesh.gather_rows_over_data(torch.full((rank + 1,), rank), [1, 2])
    shapes = [
        mesh.gather_rows_over_data(torch.zeros(n, 3), lengths).shape for n, lengths in ((rank, [0, 1]), (0, [0, 0]))
    ]
    mesh.close()
    return found.tolist(), [tuple(shape) for shape in shapes]


def test_ranks_gather_unequal_numbers_of_rows() -> None:
    assert run_ranks(gather_rows, 4) == [([0, 1, 1], [(1, 3), (0, 3)])] * 4


@dataclass
class Item:
    """Represents a step: data for all ranks, and data for the reading rank only."""

    number: int
    pixels: str | None

    def without_pixels(self) -> "Item":
        return Item(self.number, None)

    def fingerprint(self) -> str:
        return str(self.number)

    def as_value(self) -> dict[str, Any]:
        return {"number": self.number, "pixels": self.pixels}

    @classmethod
    def from_value(cls, value: dict[str, Any]) -> "Item":
        return cls(**value)


def measure_sharing(stages: int, fault: str) -> tuple[list[tuple[int, str | None]], str]:
    mesh = build_mesh(ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=stages))

    def items() -> Iterator[Item]:
        assert mesh.is_reader, "only one tensor-parallel rank of the first and the last stage reads"
        yield Item(mesh.data_parallel_rank, f"stage {mesh.pipeline.rank}")
        if fault == "broken" and mesh.pipeline.is_last:
            raise ConfigError("a broken shard")
        yield Item(10 + (mesh.pipeline.rank if fault == "drift" else 0), f"stage {mesh.pipeline.rank}")

    seen, message = [], ""
    try:
        for item in BroadcastBatches(items(), mesh, Item):
            seen.append((item.number, item.pixels))
    except ConfigError as error:
        message = str(error)
    mesh.close()
    return seen, message


def test_one_rank_reads_for_its_tensor_peers() -> None:
    """Catches items of another data-parallel rank."""
    results = run_ranks(measure_sharing, 4, 1, "")
    assert results == [([(d, "stage 0"), (10, "stage 0")], "") for d in (0, 0, 1, 1)]


def test_stages_see_the_first_ones_items() -> None:
    results = run_ranks(measure_sharing, 6, 3, "")
    views = ["stage 0", "stage 0", None, None, "stage 2", "stage 2"]
    assert results == [([(0, view), (10, view)], "") for view in views]


def test_an_error_of_one_reader_ends_all_ranks() -> None:
    """Catches ranks that wait forever after an error of the rank that reads for them."""
    for seen, message in run_ranks(measure_sharing, 4, 2, "broken"):
        assert (len(seen), message) == (1, "a broken shard")


def test_stages_that_read_different_samples_are_an_error() -> None:
    for seen, message in run_ranks(measure_sharing, 4, 2, "drift"):
        assert len(seen) == 1 and "First: 10; last: 11." in message


def count_groups() -> int:
    import torch.distributed as dist

    mesh = build_mesh(ParallelConfig())
    groups = {group.group_name for group in dist.distributed_c10d._world.pg_map}
    ones = torch.ones(2)
    assert mesh.tensor.group is None
    dist.all_reduce(ones, group=mesh.model_parallel_group)  # DeepSpeed sums over this group
    assert ones.tolist() == [1, 1]
    mesh.close()
    return len(groups)


def test_an_axis_of_one_rank_needs_no_groups() -> None:
    """Catches groups for axes of size 1: at 512 ranks, a group per rank and axis would be 1,024 groups.

    Four groups may exist: the default group, that for host values, that of data-parallel ranks, and one of this rank
    alone.
    """
    assert run_ranks(count_groups, 3) == [4, 4, 4]
