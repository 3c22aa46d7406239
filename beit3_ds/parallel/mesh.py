"""The mesh of ranks, passed to whoever communicates."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_ds.config import ParallelConfig, Place
from beit3_ds.parallel.pipeline import PipelineParallel, build_pipeline_parallel
from beit3_ds.parallel.tensor import TensorParallel


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This rank's place on the axes pipeline x data x tensor, and the groups along them; a lone rank by default.

    Global rank = (pipeline rank * data_parallel_size + data rank) * tensor_parallel_size + tensor rank, so that
    tensor-parallel peers, which talk most, are neighbours on one node.
    """

    data_parallel_group: dist.ProcessGroup | None = None
    """Ranks that hold the same part of the model and different samples."""
    data_parallel_rank: int = 0
    """This rank's number in that group."""
    data_parallel_size: int = 1
    """Ranks in that group."""
    model_parallel_group: dist.ProcessGroup | None = None
    """Ranks that together hold one copy of the model: tensor x pipeline."""
    tensor: TensorParallel = field(default_factory=TensorParallel)
    """Ranks that hold different parts of every layer and the same samples."""
    pipeline: PipelineParallel = field(default_factory=PipelineParallel)
    """Ranks that hold different layers and the same samples."""

    @property
    def place(self) -> Place:
        """This rank's coordinates, for messages."""
        return Place(self.pipeline.rank, self.data_parallel_rank, self.tensor.rank)

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, plots and renames: the first of the first stage."""
        return self.pipeline.is_first and self.data_parallel_rank == 0 and self.tensor.rank == 0

    @property
    def is_reader(self) -> bool:
        """True on the ranks that decode images: one of the tensor-parallel peers of the first and the last stage."""
        return (self.pipeline.is_first or self.pipeline.is_last) and self.tensor.rank == 0

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.pipeline.size * self.tensor.size

    @property
    def num_ranks(self) -> int:
        """Ranks on all axes."""
        return self.data_parallel_size * self.model_parallel_size

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Returns the sum of `values` over the data-parallel ranks; sends values.numel() elements."""
        if self.data_parallel_size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.data_parallel_group)
        return values

    def sum_over_model(self, values: Tensor) -> Tensor:
        """Returns the sum of `values` over the ranks of one copy of the model; sends values.numel() elements."""
        if self.model_parallel_size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.model_parallel_group)
        return values

    def sum_over_all(self, values: Tensor) -> Tensor:
        """Returns the sum of `values` over all ranks; sends values.numel() elements."""
        if self.num_ranks > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Waits until every rank of all axes is here."""
        dist.barrier()

    def close(self) -> None:
        """Leaves the process group, so that no rank warns of a leak at exit."""
        self.barrier()
        dist.destroy_process_group()


class ModelParallelUnit:
    """The `mpu` interface that DeepSpeed reads; names are Megatron-LM's.

    DeepSpeed sums gradient norms and overflow flags over the "model parallel" group, and counts what is marked
    `tensor_model_parallel` on all its ranks, other parameters only on those of model-parallel rank 0. So the group is
    that of a whole copy of the model, all stages included, and the rank is the tensor-parallel one.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks that hold the same part of the model."""
        return self._mesh.data_parallel_group

    def get_data_parallel_rank(self) -> int:
        """This rank's number among them."""
        return self._mesh.data_parallel_rank

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return self._mesh.data_parallel_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks that hold one copy of the model."""
        return self._mesh.model_parallel_group

    def get_model_parallel_rank(self) -> int:
        """0 on the ranks that answer for what tensor-parallel peers hold alike."""
        return self._mesh.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        """Ranks of one copy of the model."""
        return self._mesh.model_parallel_size


def build_mesh(parallel: ParallelConfig) -> Mesh:
    """Builds the mesh over all ranks of the initialised process group; all ranks call it.

    Raises:
        ConfigError: if the layout does not divide the number of ranks.
    """
    world_size = dist.get_world_size()
    data_size = parallel.data_parallel_size(world_size)
    place = parallel.place(dist.get_rank(), world_size)
    # Every rank makes every group, in one order: tensor, data, model, then those of the pipelines.
    ranks = torch.arange(world_size).view(parallel.pipeline_parallel_size, data_size, parallel.tensor_parallel_size)
    tensor_group = own_group(ranks.flatten(0, 1))
    data_group = own_group(ranks.transpose(1, 2).flatten(0, 1))
    model_group = own_group(ranks.transpose(0, 1).flatten(1))
    return Mesh(
        data_parallel_group=data_group,
        data_parallel_rank=place.data,
        data_parallel_size=data_size,
        model_parallel_group=model_group,
        tensor=TensorParallel(
            tensor_group, place.tensor, parallel.tensor_parallel_size, sequence_parallel=parallel.sequence_parallel
        ),
        pipeline=build_pipeline_parallel(ranks.flatten(1).t(), place.pipeline, own_group),
    )


def own_group(rows: Tensor) -> dist.ProcessGroup:
    """Makes disjoint groups, in which every rank takes part, and returns the one that this rank is in.

    Args:
        rows: the global ranks of one group a row.
    """
    made = [dist.new_group(ranks) for ranks in rows.tolist()]
    (own,) = (group for group, ranks in zip(made, rows.tolist(), strict=True) if dist.get_rank() in ranks)
    assert isinstance(own, dist.ProcessGroup)
    return own
