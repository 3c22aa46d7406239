"""How ranks divide the model."""

from dataclasses import dataclass

from beit3_ds.config.model import ModelConfig
from beit3_ds.config.strict import ConfigError, check_range


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The mesh of ranks: those that tensor parallelism leaves over are data-parallel."""

    tensor_parallel_size: int = 1
    """Ranks that divide every layer's attention heads, FFN width and vocabulary (Megatron-LM: Shoeybi et al., 2019,
    arXiv:1909.08053). They should share a node: they exchange activations in every layer."""

    def __post_init__(self) -> None:
        check_range("parallel.tensor_parallel_size", self.tensor_parallel_size, 1)

    def data_parallel_size(self, world_size: int) -> int:
        """The ranks that hold the same part of the model.

        Raises:
            ConfigError: if the layout does not divide `world_size`.
        """
        tensor = self.tensor_parallel_size
        if world_size % tensor:
            fitting = [size for size in range(1, world_size + 1) if world_size % size == 0]
            raise ConfigError(
                f"parallel: tensor_parallel_size={tensor} does not divide world_size={world_size} (total slots in the "
                f"hostfile). Sizes that do: {', '.join(map(str, fitting))}; or change the number of ranks."
            )
        return world_size // tensor

    def data_parallel_rank(self, rank: int) -> int:
        """Which share of the samples a rank reads, as `parallel.build_mesh` places it: tensor peers are neighbours."""
        return rank // self.tensor_parallel_size

    def check_model(self, model: ModelConfig) -> None:
        """Refuses a tensor-parallel size that does not divide heads and FFN width.

        Raises:
            ConfigError: with the sizes that fit.
        """
        tensor = self.tensor_parallel_size
        for name, size in (
            ("num_attention_heads", model.num_attention_heads),
            ("ffn_hidden_size", model.ffn_hidden_size),
        ):
            if size % tensor:
                fitting = [
                    other
                    for other in range(1, model.num_attention_heads + 1)
                    if model.num_attention_heads % other == 0 and model.ffn_hidden_size % other == 0
                ]
                raise ConfigError(
                    f"parallel: tensor_parallel_size={tensor} does not divide model.{name}={size}. Sizes that fit this "
                    f"model: {', '.join(map(str, fitting))}."
                )
