"""Builds one rank's part of a model without storage; traffic and memory are computed from the tensors' shapes."""

from dataclasses import dataclass

import torch
from torch import nn

from beit3_ds.config import RunConfig
from beit3_ds.model import TaskModel
from beit3_ds.model.parameter_groups import group_parameters
from beit3_ds.parallel import TensorParallel
from beit3_ds.pipeline.stages import cut_layers, stage_layers
from beit3_ds.planner.workload import BlockRows, Workload
from beit3_ds.tasks import build_task

_SIZES = {"fp32": 4, "bf16": 2}
"""Bytes per element of each dtype, by the dtype's name in DeepSpeed's configuration."""

_ZERO_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
}
"""DeepSpeed's defaults for keys of `zero_optimization`, in elements."""


@dataclass(frozen=True, kw_only=True)
class RankModel:
    """Holds one rank's part of the model, on the meta device, and the sizes of the mesh."""

    config: RunConfig
    """The run's configuration."""
    model: TaskModel
    """This rank's layers, with this rank's tensor-parallel part of each."""
    tensor: TensorParallel
    """This rank's tensor-parallel rank and size, without a process group."""
    data_parallel_size: int
    """Number of data-parallel ranks."""
    stage: int
    """Index of the pipeline stage, from 0."""
    chunks: tuple[range, ...]
    """Model chunks of the stage, as ranges in the list of layers."""
    groups: tuple[tuple[nn.Parameter, ...], ...]
    """Parameter groups of the optimizer, in the optimizer's order (`group_parameters`). No group is empty."""

    @property
    def num_stages(self) -> int:
        """Returns the number of pipeline stages."""
        return self.config.parallel.pipeline_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Returns the number of ranks that together hold one copy of the model."""
        return self.config.parallel.model_parallel_size

    @property
    def is_first(self) -> bool:
        """Returns whether this is the first stage, which holds the embeddings."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Returns whether this is the last stage, which holds the head."""
        return self.stage == self.num_stages - 1

    @property
    def element_size(self) -> int:
        """Returns the bytes per element of parameters and of the inputs of matrix products: 2 in bf16, otherwise 4."""
        return _SIZES[self.config.options.precision]

    @property
    def stream_size(self) -> int:
        """Returns the bytes per element of the residual stream."""
        return 4 if self.config.training.fp32_residual_connection else self.element_size

    @property
    def gradient_size(self) -> int:
        """Returns the bytes per element of gradient sums (`data_types.grad_accum_dtype`)."""
        return _SIZES[self.config.options.grad_accum_dtype]

    @property
    def reduced_size(self) -> int:
        """Returns the bytes per element of the gradients that data-parallel ranks send (`communication_data_type`)."""
        return _SIZES[self.config.options.communication_data_type]

    @property
    def zero_stage(self) -> int:
        """Returns the ZeRO stage, 0 to 3."""
        return self.config.options.zero_stage

    def zero_elements(self, key: str) -> int:
        """Returns the value of a key of `zero_optimization`, which is a number of elements.

        If the key is not set, returns DeepSpeed's default.
        """
        return int(self.config.options.zero.get(key, _ZERO_DEFAULTS[key]))

    @property
    def tied_elements(self) -> int:
        """Returns the number of elements in a tensor-parallel rank's part of the word embedding if two stages hold the
        embedding, else 0.
        """
        model = self.config.model
        if not model.has_tied_embedding or self.num_stages == 1:
            return 0
        split = self.tensor.split_vocabulary(model.text_vocab_size)
        return split.local_size * model.hidden_size

    def blocks_of(self, chunk: range) -> range:
        """Returns the layer numbers of the blocks in a model chunk. In the whole model, layers 1 to L are blocks."""
        return range(max(chunk.start, 1), min(chunk.stop, self.config.model.num_layers + 1))

    def block_rows(self, chunk: range, layer: int, workload: Workload) -> BlockRows:
        """Returns the numbers of rows that one block computes.

        Args:
            chunk: model chunk that contains the block.
            layer: number of the block in the list of layers, from 1.
            workload: sizes of the micro-batch.
        """
        rows = workload.every_row
        if workload.kept_rows and not self.tensor.divides_rows:
            rows = workload.kept_rows[layer - 1]
        return rows._replace(ffn=workload.masked) if self.cuts_rows(chunk, layer) else rows

    def cuts_rows(self, chunk: range, layer: int) -> bool:
        """Returns whether the FFN of block `layer` computes only masked rows. This is the case for the model's last
        block, if `chunk` also contains the head.

        False in a model with `dense`, because its heads read all rows.
        """
        model = self.config.model
        return model.dense is None and layer == model.num_layers and chunk.stop == model.num_pipeline_layers

    def parameters_of(self, chunk: range) -> list[nn.Parameter]:
        """Returns the parameters of one model chunk in the model's order, without duplicates."""
        modules: list[nn.Module] = []
        if chunk.start == 0 and self.model.embeddings is not None:
            modules.append(self.model.embeddings)
        modules += [self.model.blocks[str(layer - 1)] for layer in self.blocks_of(chunk)]
        if chunk.stop == self.config.model.num_pipeline_layers:
            modules += [module for module in (self.model.norm, self.model.heads) if module is not None]
        return list({id(p): p for module in modules for p in module.parameters()}.values())


def build_rank_model(config: RunConfig, world_size: int, stage: int = 0, tensor_rank: int = 0) -> RankModel:
    """Builds one rank's part of the model on the meta device.

    Args:
        config: the run's configuration.
        world_size: total number of ranks.
        stage: pipeline stage of the rank.
        tensor_rank: tensor-parallel rank.

    Raises:
        ConfigError: if `world_size` is not a multiple of the product of the parallel sizes.
    """
    parallel = config.parallel
    data_parallel_size = parallel.data_parallel_size(world_size)
    tensor = TensorParallel(
        None, tensor_rank, parallel.tensor_parallel_size, sequence_parallel=parallel.sequence_parallel
    )
    task = build_task(config)
    chunks = stage_layers(cut_layers(config, task.expected_head_flops()), stage, parallel.pipeline_parallel_size)
    with torch.device("meta"):
        model = task.build_model(tensor, chunks)
    assert isinstance(model, TaskModel), "the planner models BEiT-3 with the head of a task"
    groups = group_parameters(dict(model.named_parameters()), config)
    return RankModel(
        config=config,
        model=model,
        tensor=tensor,
        data_parallel_size=data_parallel_size,
        stage=stage,
        chunks=tuple(chunks),
        groups=tuple(map(tuple, groups.values())),
    )
