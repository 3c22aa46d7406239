"""The mesh of ranks, passed to whoever communicates."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from beit3_ds.parallel.tensor import TensorParallel


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This rank's place on the axes data x tensor, and the groups along them.

    Global rank = data_parallel_rank * tensor_parallel_size + tensor_parallel_rank, so that tensor-parallel peers, which
    talk most, are neighbours on one node.
    """

    data_parallel_group: dist.ProcessGroup
    """Ranks that hold the same part of the model and different samples."""
    data_parallel_rank: int
    """This rank's number in that group."""
    data_parallel_size: int
    """Ranks in that group."""
    tensor: TensorParallel
    """Ranks that hold different parts of the model and the same samples."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, plots and renames."""
        return self.data_parallel_rank == 0 and self.tensor.rank == 0

    @property
    def num_ranks(self) -> int:
        """Ranks on all axes."""
        return self.data_parallel_size * self.tensor.size

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Returns the sum of `values` over the data-parallel ranks; sends values.numel() elements."""
        if self.data_parallel_size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.data_parallel_group)
        return values

    def barrier(self) -> None:
        """Waits until every rank of all axes is here."""
        dist.barrier()

    def close(self) -> None:
        """Leaves the process group, so that no rank warns of a leak at exit."""
        self.barrier()
        dist.destroy_process_group()


class ModelParallelUnit:
    """The `mpu` interface that DeepSpeed reads: names are Megatron-LM's, "model parallel" is tensor-parallel."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same part of the model."""
        return self._mesh.data_parallel_group

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return self._mesh.data_parallel_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks that divide every layer."""
        return self._mesh.tensor.group

    def get_model_parallel_rank(self) -> int:
        """This rank's number among them."""
        return self._mesh.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        """How many they are."""
        return self._mesh.tensor.size


def build_mesh(tensor_parallel_size: int) -> Mesh:
    """Builds the mesh over all ranks of the initialised process group; all ranks call it.

    Args:
        tensor_parallel_size: P; it divides the number of ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert world_size % tensor_parallel_size == 0, f"tensor size {tensor_parallel_size} for {world_size} ranks"
    data_parallel_size = world_size // tensor_parallel_size
    data_rank, tensor_rank = divmod(rank, tensor_parallel_size)
    tensor_groups = [range(i, i + tensor_parallel_size) for i in range(0, world_size, tensor_parallel_size)]
    data_groups = [range(i, world_size, tensor_parallel_size) for i in range(tensor_parallel_size)]
    return Mesh(
        data_parallel_group=_own_group(data_groups),
        data_parallel_rank=data_rank,
        data_parallel_size=data_parallel_size,
        tensor=TensorParallel(_own_group(tensor_groups), tensor_rank, tensor_parallel_size),
    )


def _own_group(groups: list[range]) -> dist.ProcessGroup:
    """Makes disjoint groups, in which every rank takes part, and returns the one that this rank is in."""
    made = [dist.new_group(list(ranks)) for ranks in groups]
    (own,) = (group for group, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks)
    assert isinstance(own, dist.ProcessGroup)
    return own
