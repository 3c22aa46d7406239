"""Defines the section "parallel": how ranks divide the model and the samples."""

from dataclasses import dataclass
from typing import NamedTuple

from beit3_ds.config.model import ModelConfig
from beit3_ds.config.numbers import Ranks, Seconds
from beit3_ds.config.strict import ConfigError


class RankCoords(NamedTuple):
    """Holds a rank's coordinates on the pipeline, data and tensor axes of the mesh."""

    pipeline: int
    data: int
    tensor: int

    def __str__(self) -> str:
        return f"stage {self.pipeline}, data-parallel rank {self.data}, tensor-parallel rank {self.tensor}"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Configures the mesh of ranks: pipeline x data x tensor.

    The data-parallel size is not configured: it is the number of ranks divided by the pipeline and tensor sizes.
    """

    tensor_parallel_size: Ranks = 1
    """Number of ranks over which the attention heads, the FFN hidden size and the vocabulary are divided (Megatron-LM:
    Shoeybi et al., 2019, arXiv:1909.08053). These ranks communicate in every layer, so they should be on one node."""
    sequence_parallel: bool = False
    """Whether tensor-parallel ranks also divide the activations outside attention and FFN, along the sequence
    (Korthikanti et al., 2022, arXiv:2205.05198). This reduces the memory for activations, and ranks send the same
    number of bytes as with tensor parallelism alone. Off by default, because the option changes the rounding of sums.
    """
    pipeline_parallel_size: Ranks = 1
    """Number of pipeline stages over which the layers are divided (1F1B: Narayanan et al., 2021, arXiv:2104.04473).
    Must not exceed the number of micro-batches (`gradient_accumulation_steps`)."""
    virtual_pipeline_parallel_size: Ranks = 1
    """Number of model chunks per pipeline stage, for the interleaved schedule. A value v divides the idle time of the
    stages by v, and multiplies the number of messages by v. With v > 1, the number of stages must divide the number of
    micro-batches."""
    timeout_seconds: Seconds = 1800
    """Maximum time, in seconds, that a rank waits for another rank before the run ends. Must exceed the time of the
    slowest checkpoint and of the slowest evaluation."""
    heartbeat_timeout_seconds: Seconds = 60
    """Maximum time, in seconds, between two heartbeats of a rank. If no heartbeat arrives in this time, the run ends.
    Heartbeats stop if the rank's process, host or network link fails. A separate thread of each rank sends six
    heartbeats in this time. The time must be longer than any delay of the thread on a busy host."""

    def __post_init__(self) -> None:
        if self.virtual_pipeline_parallel_size > 1 and self.pipeline_parallel_size == 1:
            raise ConfigError(
                f"parallel: virtual_pipeline_parallel_size={self.virtual_pipeline_parallel_size} interleaves the "
                "layers of several stages, but pipeline_parallel_size is 1. Raise pipeline_parallel_size, or leave out "
                "virtual_pipeline_parallel_size."
            )

    @property
    def model_parallel_size(self) -> int:
        """Returns the number of ranks per copy of the model: tensor-parallel size x pipeline-parallel size."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def num_chunks(self) -> int:
        """Returns the total number of model chunks: pipeline stages x chunks per stage."""
        return self.pipeline_parallel_size * self.virtual_pipeline_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Returns the data-parallel size: `world_size` / `model_parallel_size`.

        Raises:
            ConfigError: if `model_parallel_size` does not divide `world_size`.
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
        """Returns the mesh coordinates of a rank.

        Consecutive ranks form a tensor-parallel group, because ranks of such a group communicate most. The ranks of a
        pipeline stage are consecutive too.
        """
        pipeline, rest = divmod(rank, world_size // self.pipeline_parallel_size)
        return RankCoords(pipeline, *divmod(rest, self.tensor_parallel_size))

    def check_model(self, model: ModelConfig, micro_batches: int) -> None:
        """Checks that the parallel sizes fit the model and the number of micro-batches per step.

        Args:
            model: configuration of the model.
            micro_batches: number of micro-batches per rank and step.

        Raises:
            ConfigError: if the sizes do not fit; the message names the broken rule and sizes that fit.
        """
        fault = self.find_fault(model, micro_batches)
        if fault is not None:
            raise ConfigError(fault)

    def find_fault(self, model: ModelConfig, micro_batches: int) -> str | None:
        """Returns an error message for the first rule that the sizes break, or None if the sizes fit. `check_model`
        raises an error with this message.
        """
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
