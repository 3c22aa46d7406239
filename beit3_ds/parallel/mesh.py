"""Arranges ranks on the pipeline, data and tensor axes, and holds the process groups along these axes."""

import hashlib
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"
from torch import Tensor

from beit3_ds.config import ConfigError, ParallelConfig, RankCoords
from beit3_ds.parallel.activity import Activity
from beit3_ds.parallel.host_group import HostGroup, build_host_group
from beit3_ds.parallel.pipeline import PipelineParallel, build_pipeline_parallel
from beit3_ds.parallel.tensor import TensorParallel
from beit3_ds.rank_names import join_ranks

_LISTED = 8  # a message names at most this many hosts


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Holds this rank's position in the mesh (pipeline x data x tensor), and the process groups along its axes.

    By default, the mesh has a single rank. Global rank = (pipeline rank * data_parallel_size + data rank) *
    tensor_parallel_size + tensor rank. Tensor-parallel ranks communicate most. They have consecutive numbers, so that
    they can share a node.

    Process groups and the `sum_*` methods accept only tensors on this rank's device, because NCCL rejects CPU tensors.
    Values in host memory are exchanged through `host`, `data_host`, `tensor.host` and `pipeline.host`.
    """

    host: HostGroup = field(default_factory=HostGroup)
    """Group of all ranks for values in host memory, such as counts and names."""
    data_host: HostGroup = field(default_factory=HostGroup)
    """Group that exchanges values in host memory; it has the ranks of `data_parallel_group`."""

    data_parallel_group: dist.ProcessGroup | None = None
    """Process group of the ranks that hold the same part of the model and process different samples."""
    data_parallel_rank: int = 0
    """This rank's number in `data_parallel_group`."""
    data_parallel_size: int = 1
    """Number of ranks in `data_parallel_group`."""
    model_parallel_group: dist.ProcessGroup | None = None
    """Process group of the ranks that together hold one copy of the model (all tensor and pipeline ranks)."""
    tensor: TensorParallel = field(default_factory=TensorParallel)
    """Group of the ranks that hold different parts of each layer and process the same samples."""
    pipeline: PipelineParallel = field(default_factory=PipelineParallel)
    """Group of the ranks that hold different layers and process the same samples."""
    all_coords: tuple[RankCoords, ...] = (RankCoords(0, 0, 0),)
    """Mesh coordinates of each global rank."""
    hosts: tuple[str, ...] = field(default_factory=lambda: (socket.gethostname(),))
    """Host name of each global rank."""
    store: dist.Store | None = None
    """Store of the default process group. The mesh keeps a reference, because torch's groups do not keep the Python
    object alive."""
    activity: Activity = field(default_factory=Activity)
    """Step and phase of this rank, which `runtime.Watchdog` reports to other ranks."""

    @property
    def coords(self) -> RankCoords:
        """Returns the mesh coordinates of this rank."""
        return RankCoords(self.pipeline.rank, self.data_parallel_rank, self.tensor.rank)

    @property
    def is_main(self) -> bool:
        """Returns whether this is global rank 0, the only rank that prints progress and writes reports."""
        return self.pipeline.is_first and self.data_parallel_rank == 0 and self.tensor.rank == 0

    @property
    def is_reader(self) -> bool:
        """Returns whether this rank reads data: tensor-parallel rank 0 of the first and of the last stage."""
        return (self.pipeline.is_first or self.pipeline.is_last) and self.tensor.rank == 0

    @property
    def model_parallel_size(self) -> int:
        """Returns the number of ranks that together hold one copy of the model."""
        return self.pipeline.size * self.tensor.size

    @property
    def num_ranks(self) -> int:
        """Returns the total number of ranks."""
        return self.data_parallel_size * self.model_parallel_size

    def describe_layout(self) -> str:
        """Returns the number of ranks along each axis as text."""
        axes = f"{self.data_parallel_size} data-parallel x {self.tensor.size} tensor-parallel ranks"
        return axes if self.pipeline.size == 1 else f"{self.pipeline.size} stages of {axes}"

    def describe(self, rank: int) -> str:
        """Returns the number, coordinates and host of a global rank as text for messages."""
        return f"rank {rank} ({self.all_coords[rank]}, host {self.hosts[rank]})"

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Sums a device tensor over the data-parallel ranks (one all-reduce of the tensor)."""
        if self.data_parallel_size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.data_parallel_group)
        return values

    def sum_over_model(self, values: Tensor) -> Tensor:
        """Sums a device tensor over the ranks that together hold one model. Costs one all-reduce of the tensor."""
        if self.model_parallel_size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.model_parallel_group)
        return values

    def sum_over_all(self, values: Tensor) -> Tensor:
        """Sums a device tensor over all ranks (one all-reduce of the tensor)."""
        if self.num_ranks > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather_rows_over_data(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Concatenates the rows of `x` from all data-parallel ranks in rank order. Each rank sends max(lengths) rows;
        the result does not contain the padding.

        Args:
            x: device tensor with this rank's rows; only the first dimension may differ between ranks.
            lengths: number of rows on each data-parallel rank.
        """
        if self.data_parallel_size == 1:
            return x
        padded = x.new_zeros(max(lengths), *x.shape[1:])
        padded[: len(x)] = x
        gathered = x.new_empty(self.data_parallel_size * len(padded), *x.shape[1:])
        if gathered.numel():
            dist.all_gather_into_tensor(gathered, padded, group=self.data_parallel_group)
        pieces = zip(gathered.split(max(1, len(padded))), lengths, strict=False)
        return torch.cat([piece[:length] for piece, length in pieces])

    def name_ranks(self, ranks: Iterable[int]) -> str:
        """Lists global ranks by host, as text for messages, such as "ranks 4-7 (host b), rank 9 (host c)"."""
        by_host: dict[str, list[int]] = {}
        for rank in ranks:
            by_host.setdefault(self.hosts[rank], []).append(rank)
        names = [f"{join_ranks(numbers)} (host {host})" for host, numbers in by_host.items()]
        more = f" and ranks of {len(names) - _LISTED} more hosts" if len(names) > _LISTED else ""
        return ", ".join(names[:_LISTED]) + more

    def check_agreement(self, what: str, value: str, way_out: str) -> None:
        """Checks that a setting is equal on all ranks. Gathers 8 bytes per rank.

        Args:
            what: name of the setting, for the message.
            value: this rank's value of the setting.
            way_out: last sentence of the message; tells the user what to do.

        Raises:
            ConfigError: on all ranks, if the setting differs; the message names the ranks that differ from rank 0.
        """
        if self.num_ranks == 1:
            return
        digest = int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "big", signed=True)
        digests = self.host.gather(digest)
        others = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            raise ConfigError(
                f"{self.name_ranks(others)} started with another {what} than rank 0 (host {self.hosts[0]}). {way_out}"
            )

    def barrier(self) -> None:
        """Waits until all ranks have called this method. Does not wait for work on the devices."""
        self.host.barrier()

    def close(self) -> None:
        """Waits for all ranks, and then leaves the process group.

        The store may be in rank 0's process. Without the wait, rank 0 could end while other ranks still use the store.
        """
        self.barrier()
        self.leave()

    def leave(self) -> None:
        """Leaves the process group without waiting for other ranks.

        A process that exits without this call may be aborted by torch's threads.
        """
        dist.destroy_process_group()


class ModelParallelUnit:
    """Describes the mesh to DeepSpeed through the `mpu` interface, whose method names come from Megatron-LM.

    DeepSpeed sums gradient norms over the "model parallel" group. The group therefore contains all ranks of one copy of
    the model, including all pipeline stages. DeepSpeed counts parameters marked `tensor_model_parallel` on all ranks of
    the group, and other parameters only where the "model parallel rank" is 0. For this purpose, the "model parallel"
    rank must be the tensor-parallel rank. The "model parallel" size is the tensor-parallel size.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Returns the group of the ranks that hold the same part of the model."""
        return self._mesh.data_parallel_group

    def get_data_parallel_rank(self) -> int:
        """Returns this rank's number in the data-parallel group."""
        return self._mesh.data_parallel_rank

    def get_data_parallel_world_size(self) -> int:
        """Returns the number of data-parallel ranks."""
        return self._mesh.data_parallel_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Returns the group of the ranks that together hold one copy of the model."""
        return self._mesh.model_parallel_group

    def get_model_parallel_rank(self) -> int:
        """Returns the tensor-parallel rank. DeepSpeed counts replicated parameters only on rank 0."""
        return self._mesh.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        """Returns the number of tensor-parallel ranks."""
        return self._mesh.tensor.size


def build_mesh(parallel: ParallelConfig, store: dist.Store | None = None) -> Mesh:
    """Builds the mesh over all ranks of the default process group. All ranks must call this function.

    Gathers the host names of all ranks.

    Args:
        parallel: parallel sizes and timeout.
        store: the process group's store, if it is a Python object that the mesh must keep alive; otherwise None.

    Raises:
        ConfigError: if the parallel sizes do not divide the number of ranks.
    """
    world_size = dist.get_world_size()
    data_size = parallel.data_parallel_size(world_size)
    coords = parallel.rank_coords(dist.get_rank(), world_size)
    # Every rank creates every group, in one order: tensor, data, model, then the pipelines' groups.
    ranks = torch.arange(world_size).view(parallel.pipeline_parallel_size, data_size, parallel.tensor_parallel_size)
    timeout = timedelta(seconds=parallel.timeout_seconds)
    host = build_host_group(timeout)
    tensor_group = own_group(ranks.flatten(0, 1), timeout) if parallel.tensor_parallel_size > 1 else None
    data_group = own_group(ranks.transpose(1, 2).flatten(0, 1), timeout)
    model_group = own_group(ranks.transpose(0, 1).flatten(1), timeout) if data_size < world_size else _group_of_one()
    return Mesh(
        store=store,
        host=host,
        data_host=host.among(ranks[coords.pipeline, :, coords.tensor].tolist()),
        all_coords=tuple(parallel.rank_coords(rank, world_size) for rank in range(world_size)),
        hosts=tuple(host.gather(socket.gethostname())),
        data_parallel_group=data_group,
        data_parallel_rank=coords.data,
        data_parallel_size=data_size,
        model_parallel_group=model_group,
        tensor=TensorParallel(
            tensor_group,
            coords.tensor,
            parallel.tensor_parallel_size,
            host=host.among(ranks[coords.pipeline, coords.data].tolist()),
            sequence_parallel=parallel.sequence_parallel,
        ),
        pipeline=build_pipeline_parallel(
            ranks.flatten(1).t(), coords.pipeline, host, lambda rows: own_group(rows, timeout)
        ),
    )


def own_group(rows: Tensor, timeout: timedelta) -> dist.ProcessGroup:
    """Creates one process group per row, and returns the group of this rank. All ranks must call this function.

    Args:
        rows: global ranks of each group; each rank is in exactly one row.
        timeout: maximum time of a collective. New groups do not inherit the default group's timeout.
    """
    groups = [dist.new_group(ranks, timeout=timeout) for ranks in rows.tolist()]
    (own,) = (group for group, ranks in zip(groups, rows.tolist(), strict=True) if dist.get_rank() in ranks)
    assert isinstance(own, dist.ProcessGroup)
    return own


def _group_of_one() -> dist.ProcessGroup:
    """Returns a group that contains only this rank. Neither building nor using the group involves other ranks."""
    group = dist.new_group([dist.get_rank()], backend="fake", use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group
