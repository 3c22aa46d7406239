"""Defines the "parallel" section: how ranks divide the model and the samples."""

from dataclasses import dataclass
from typing import NamedTuple

from beit3_ds.config.model import ModelConfig
from beit3_ds.config.numbers import Ranks, Seconds
from beit3_ds.config.strict import ConfigError


class RankCoords(NamedTuple):
    """Holds a rank's coordinates on the mesh pipeline x data x tensor."""

    pipeline: int
    data: int
    tensor: int

    def __str__(self) -> str:
        return f"stage {self.pipeline}, data-parallel rank {self.data}, tensor-parallel rank {self.tensor}"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sets the mesh of ranks, pipeline x data x tensor; the data-parallel size follows from the number of ranks."""

    tensor_parallel_size: Ranks = 1
    """Ranks that divide every layer's attention heads, FFN width and vocabulary (Megatron-LM: Shoeybi et al., 2019,
    arXiv:1909.08053). They should share a node: they exchange activations in every layer."""
    sequence_parallel: bool = False
    """Divides the rows between attention and FFN over tensor-parallel ranks, which would all compute the same there
    (Korthikanti et al., 2022, arXiv:2205.05198). It saves activation memory and sends the same number of bytes. Off by
    default, because the rounding of sums differs with it."""
    pipeline_parallel_size: Ranks = 1
    """Stages that divide the ordered list of layers (1F1B: Narayanan et al., 2021, arXiv:2104.04473). There must
    be at least this many micro-batches (`gradient_accumulation_steps`)."""
    virtual_pipeline_parallel_size: Ranks = 1
    """Model chunks per stage, interleaved with the chunks of the other stages. A value v divides the bubble by v and
    multiplies the messages by v. With v > 1, micro-batches must be a multiple of the stages."""
    timeout_seconds: Seconds = 1800
    """Longest wait of a rank for another before the run ends; must exceed the slowest checkpoint and evaluation."""
    heartbeat_timeout_seconds: Seconds = 60
    """Longest time without a heartbeat of a rank before the run ends: its process was stopped or killed, its host is
    gone, or the link is down. A thread of its own sends six heartbeats in this time, so a rank with a slow
    main thread does not count as lost. Choose more than the longest time for which a busy host may not run that
    thread."""

    def __post_init__(self) -> None:
        if self.virtual_pipeline_parallel_size > 1 and self.pipeline_parallel_size == 1:
            raise ConfigError(
                f"parallel: virtual_pipeline_parallel_size={self.virtual_pipeline_parallel_size} interleaves the "
                "layers of several stages, but pipeline_parallel_size is 1. Raise the second or leave the first out."
            )

    @property
    def model_parallel_size(self) -> int:
        """Returns the ranks that hold one copy of the model: tensor x pipeline."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def num_chunks(self) -> int:
        """Returns the number of model chunks: stages x chunks per stage."""
        return self.pipeline_parallel_size * self.virtual_pipeline_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Returns the number of ranks that hold the same part of the model.

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
        """Returns a rank's coordinates; tensor peers are neighbours, then data-parallel ranks, then stages.

        Tensor peers, which communicate most, then share a node; stages, which communicate least, are far apart.
        """
        pipeline, rest = divmod(rank, world_size // self.pipeline_parallel_size)
        return RankCoords(pipeline, *divmod(rest, self.tensor_parallel_size))

    def check_model(self, model: ModelConfig, micro_batches: int) -> None:
        """Refuses a layout that does not fit the model or the micro-batches of a step.

        Raises:
            ConfigError: naming the rule and the sizes that fit.
        """
        fault = self.find_fault(model, micro_batches)
        if fault is not None:
            raise ConfigError(fault)

    def find_fault(self, model: ModelConfig, micro_batches: int) -> str | None:
        """Returns the first rule of `check_model` that this layout breaks, with a way out; None if it fits."""
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
