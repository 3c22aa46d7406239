"""The mesh of ranks, passed to whoever communicates."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Mesh:
    """This rank's place, and the group that it reduces over. Today every rank is a data-parallel one."""

    data_parallel_group: dist.ProcessGroup
    """Ranks that hold the same part of the model and different samples."""
    data_parallel_rank: int
    """This rank's number in that group."""
    data_parallel_size: int
    """Ranks in that group."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, plots and renames."""
        return self.data_parallel_rank == 0

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Returns the sum of `values` over the data-parallel ranks; sends values.numel() elements."""
        if self.data_parallel_size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.data_parallel_group)
        return values

    def barrier(self) -> None:
        """Waits until every rank is here."""
        dist.barrier(group=self.data_parallel_group)

    def close(self) -> None:
        """Leaves the process group, so that no rank warns of a leak at exit."""
        self.barrier()
        dist.destroy_process_group()


def build_mesh() -> Mesh:
    """Builds the mesh over all ranks of the initialised process group."""
    group = dist.group.WORLD
    assert group is not None, "initialise torch.distributed first"
    return Mesh(group, dist.get_rank(group), dist.get_world_size(group))
