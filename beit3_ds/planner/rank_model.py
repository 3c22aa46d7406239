"""What one rank holds of a model, without storage: the shapes that traffic and memory follow from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from beit3_ds.config import RunConfig
from beit3_ds.model import BEiT3
from beit3_ds.parallel import TensorParallel
from beit3_ds.pipeline.stages import cut_layers, stage_layers
from beit3_ds.planner.workload import BlockRows, Workload

_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes per element, by DeepSpeed's names of dtypes; without a name DeepSpeed chooses."""


@dataclass(frozen=True, kw_only=True)
class RankModel:
    """One rank's part of the model, on the meta device, and the sizes of the mesh around it."""

    config: RunConfig
    """Of the run."""
    model: BEiT3
    """This rank's layers, tensor-parallel part only."""
    tensor: TensorParallel
    """Its place among the ranks that divide every layer; without a group, so nothing can be sent."""
    data_size: int
    """Ranks that hold the same part."""
    stage: int
    """Of the pipeline."""
    runs: tuple[range, ...]
    """The runs of layers that the stage holds."""
    groups: tuple[tuple[nn.Parameter, ...], ...]
    """The optimizer's parameter groups, in its order: decayed, not decayed; none is empty."""

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return self.config.parallel.pipeline_parallel_size

    @property
    def model_size(self) -> int:
        """Ranks of one copy of the model."""
        return self.config.parallel.model_parallel_size

    @property
    def is_first(self) -> bool:
        """Whether the stage embeds."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage holds the heads."""
        return self.stage == self.num_stages - 1

    @property
    def element_size(self) -> int:
        """Bytes per element of parameters, products and their inputs: 2 in bf16, else 4."""
        return 2 if self.is_bf16 else 4

    @property
    def stream_size(self) -> int:
        """Bytes per element of the residual stream between the layers."""
        return 4 if self.config.training.fp32_residual_connection else self.element_size

    @property
    def gradient_size(self) -> int:
        """Bytes per element of the gradient sums of micro-batches (`data_types.grad_accum_dtype`)."""
        dtype = self.config.deepspeed.get("data_types", {}).get("grad_accum_dtype")
        return self.element_size if dtype is None else _SIZES[dtype]

    @property
    def reduced_size(self) -> int:
        """Bytes per element of gradients that data-parallel ranks send (`communication_data_type`)."""
        dtype = self.config.deepspeed.get("communication_data_type")
        return self.element_size if dtype is None else _SIZES[dtype]

    @property
    def is_bf16(self) -> bool:
        """Whether parameters and activations are bf16."""
        return bool(self.config.deepspeed.get("bf16", {}).get("enabled", False))

    @property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's `zero_optimization` section."""
        return dict(self.config.deepspeed.get("zero_optimization", {}))

    @property
    def zero_stage(self) -> int:
        """0 to 3."""
        return int(self.zero.get("stage", 0))

    @property
    def tied_elements(self) -> int:
        """Elements of this rank's part of the word table, with padding, if first and last stage share it; else 0."""
        model = self.config.model
        if not model.tie_word_embeddings or self.num_stages == 1:
            return 0
        split = self.tensor.split_vocabulary(model.text_vocab_size)
        return split.local_size * model.hidden_size

    def blocks_of(self, run: range) -> range:
        """The blocks of one run of layers, by their numbers in the list of all layers: from 1 to L."""
        return range(max(run.start, 1), min(run.stop, self.config.model.num_layers + 1))

    def block_rows(self, run: range, layer: int, load: Workload) -> BlockRows:
        """The rows that a block in this run computes, given by its number in the list of layers."""
        rows = load.every_row
        if load.kept_rows and not self.tensor.divides_rows:
            rows = load.kept_rows[layer - 1]
        return rows._replace(ffn=load.masked) if self.cuts_rows(run, layer) else rows

    def cuts_rows(self, run: range, layer: int) -> bool:
        """Whether the FFN of a block in this run computes masked rows only: that of the last, if the heads follow."""
        model = self.config.model
        return layer == model.num_layers and run.stop == model.num_pipeline_layers

    def parameters_of(self, run: range) -> list[nn.Parameter]:
        """The parameters that a pass through one run of layers uses, in the model's order, each once."""
        modules: list[nn.Module] = []
        if run.start == 0 and self.model.embeddings is not None:
            modules.append(self.model.embeddings)
        modules += [self.model.blocks[str(layer - 1)] for layer in self.blocks_of(run)]
        if run.stop == self.config.model.num_pipeline_layers and self.model.heads is not None:
            modules.append(self.model.heads)
        return list({id(p): p for module in modules for p in module.parameters()}.values())


def build_rank_model(
    config: RunConfig, world_size: int, decays: Callable[[str], bool], stage: int = 0, tensor_rank: int = 0
) -> RankModel:
    """Builds one rank's part of the model on the meta device.

    Args:
        config: of the run.
        world_size: ranks.
        decays: whether the optimizer decays the parameter of a name, which is how it groups them.
        stage: whose part of the pipeline.
        tensor_rank: whose part of every layer.

    Raises:
        ConfigError: if the layout does not divide the ranks.
    """
    parallel = config.parallel
    data_size = parallel.data_parallel_size(world_size)
    tensor = TensorParallel(
        None, tensor_rank, parallel.tensor_parallel_size, sequence_parallel=parallel.sequence_parallel
    )
    runs = stage_layers(cut_layers(config), stage, parallel.pipeline_parallel_size)
    with torch.device("meta"):
        model = BEiT3(config.model, tensor, runs, config.training.activation_checkpointing)
    named = list(model.named_parameters())
    groups = (tuple(p for n, p in named if decays(n)), tuple(p for n, p in named if not decays(n)))
    return RankModel(
        config=config,
        model=model,
        tensor=tensor,
        data_size=data_size,
        stage=stage,
        runs=tuple(runs),
        groups=tuple(group for group in groups if group),
    )
