"""How ranks divide the model and the samples."""

from dataclasses import dataclass
from typing import NamedTuple

from beit3_ds.config.model import ModelConfig
from beit3_ds.config.numbers import Ranks, Seconds
from beit3_ds.config.strict import ConfigError


class RankCoords(NamedTuple):
    """A rank's coordinates on the mesh pipeline x data x tensor."""

    pipeline: int
    data: int
    tensor: int

    def __str__(self) -> str:
        return f"stage {self.pipeline}, data-parallel rank {self.data}, tensor-parallel rank {self.tensor}"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The mesh of ranks, pipeline x data x tensor: those that two axes leave over are data-parallel."""

    tensor_parallel_size: Ranks = 1
    """Ranks that divide every layer's attention heads, FFN width and vocabulary (Megatron-LM: Shoeybi et al., 2019,
    arXiv:1909.08053). They should share a node: they exchange activations in every layer."""
    sequence_parallel: bool = False
    """Between attention and FFN, where tensor-parallel ranks would all do the same, each keeps its part of the rows
    (Korthikanti et al., 2022, arXiv:2205.05198). Sends as many bytes and saves activation memory; off by default
    because the rounding of sums differs with it."""
    pipeline_parallel_size: Ranks = 1
    """Stages that divide the ordered list of layers (1F1B: Narayanan et al., 2021, arXiv:2104.04473). At least as many
    micro-batches (`gradient_accumulation_steps`) are needed."""
    virtual_pipeline_parallel_size: Ranks = 1
    """Runs of layers a stage holds, interleaved with those of the other stages: 1 / this the bubble, as many times the
    messages. Micro-batches must then be a multiple of the stages."""
    timeout_seconds: Seconds = 1800
    """How long a rank waits for another before it ends the run. Longer than the slowest checkpoint and evaluation."""
    heartbeat_timeout_seconds: Seconds = 60
    """How long a rank may give no sign of life before the run ends: its process was stopped or killed, its host is gone
    or the link is down. A thread gives one six times in this time, whatever the main thread waits for, so a slow rank
    is not lost. Longer than the host may be too busy to run that thread."""

    def __post_init__(self) -> None:
        if self.virtual_pipeline_parallel_size > 1 and self.pipeline_parallel_size == 1:
            raise ConfigError(
                f"parallel: virtual_pipeline_parallel_size={self.virtual_pipeline_parallel_size} interleaves the "
                "layers of several stages, but pipeline_parallel_size is 1. Raise the second or leave the first out."
            )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model: tensor x pipeline."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def num_chunks(self) -> int:
        """Runs of layers that the model is cut into: stages x runs of each."""
        return self.pipeline_parallel_size * self.virtual_pipeline_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """The ranks that hold the same part of the model.

        Raises:
            ConfigError: if the layout does not divide `world_size`.
        """
        if world_size % self.model_parallel_size:
            fitting = [size for size in range(1, world_size + 1) if world_size % size == 0]
            raise ConfigError(
                f"parallel: tensor_parallel_size={self.tensor_parallel_size} x pipeline_parallel_size="
                f"{self.pipeline_parallel_size} = {self.model_parallel_size} does not divide world_size={world_size} "
                f"(total slots in the hostfile). Products that do: {_join(fitting)}; or change the number of ranks."
            )
        return world_size // self.model_parallel_size

    def rank_coords(self, rank: int, world_size: int) -> RankCoords:
        """A rank's coordinates: tensor peers are neighbours, then data-parallel ranks, then stages.

        So tensor peers, which talk most, share a node, and stages, which talk least, are far apart.
        """
        pipeline, rest = divmod(rank, world_size // self.pipeline_parallel_size)
        return RankCoords(pipeline, *divmod(rest, self.tensor_parallel_size))

    def check_model(self, model: ModelConfig, micro_batches: int) -> None:
        """Refuses a layout that does not fit the model or the micro-batches of a step.

        Raises:
            ConfigError: with the rule and the sizes that fit.
        """
        fault = self.find_fault(model, micro_batches)
        if fault is not None:
            raise ConfigError(fault)

    def find_fault(self, model: ModelConfig, micro_batches: int) -> str | None:
        """The first rule that this layout breaks, with a way out; None if it fits. See `check_model`."""
        tensor, stages, virtual = (
            self.tensor_parallel_size,
            self.pipeline_parallel_size,
            self.virtual_pipeline_parallel_size,
        )
        for name in ("num_attention_heads", "ffn_hidden_size"):
            if getattr(model, name) % tensor:
                return (
                    f"parallel: tensor_parallel_size={tensor} does not divide model.{name}={getattr(model, name)}. "
                    f"Sizes that fit this model: {_join(_tensor_sizes(model))}."
                )
        smallest = min(model.text_vocab_size, model.visual_vocab_size)
        if tensor > smallest:
            return f"parallel: tensor_parallel_size={tensor} leaves ranks without a row of a vocabulary of {smallest}."
        layers = model.num_pipeline_layers
        if self.num_chunks > layers:
            return (
                f"parallel: pipeline_parallel_size={stages} x virtual_pipeline_parallel_size={virtual} = "
                f"{self.num_chunks} exceeds the {layers} layers of this model (embeddings, {model.num_layers} blocks, "
                f"heads). At most {layers // virtual} stages fit, or fewer virtual ones."
            )
        if micro_batches < stages:
            return (
                f"gradient_accumulation_steps={micro_batches} gives fewer micro-batches than parallel."
                f"pipeline_parallel_size={stages} has stages, so stages would idle all the time. Use at least {stages} "
                f"(a multiple of {stages} if interleaved; 4 x {stages} keeps the bubble below a fifth)."
            )
        if virtual > 1 and micro_batches % stages:
            below = micro_batches // stages * stages
            return (
                f"gradient_accumulation_steps={micro_batches} is no multiple of parallel.pipeline_parallel_size="
                f"{stages}, which interleaving needs. The nearest that fit: {below} or {below + stages}."
            )
        return None


def _tensor_sizes(model: ModelConfig) -> list[int]:
    heads, width = model.num_attention_heads, model.ffn_hidden_size
    return [size for size in range(1, heads + 1) if heads % size == 0 and width % size == 0]


def _join(values: list[int]) -> str:
    return ", ".join(map(str, values))
