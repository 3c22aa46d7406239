"""BEiT-3 with the head of a task, which turns the stream into the sums of the task's loss terms."""

# T packed rows, M rows that the head reads, D hidden, K terms.

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ActivationCheckpointing, Kernels, ModelConfig
from beit3_ds.model.beit3 import BEiT3
from beit3_ds.parallel import TensorParallel, VocabParallelHead


class LossOutput(NamedTuple):
    """The loss of one micro-batch."""

    total: Tensor
    """Weighted sum to differentiate, float32 scalar."""
    sums: Tensor
    """Sum of each of the task's terms, (K,) float32, detached."""


class Head(nn.Module, ABC):
    """The last layer of a task's model."""

    @property
    def word_table(self) -> VocabParallelHead | None:
        """The layer whose matrix is the word table with `tie_word_embeddings`; None if the head has none."""
        return None

    @abstractmethod
    def forward(self, h_MD: Tensor, batch: PackedBatch, with_loss: bool) -> Any:
        """Computes the task's terms, or its predictions.

        Args:
            h_MD: normalised rows that the head reads, (M, D), all of them on every tensor-parallel rank.
            batch: with the task's targets, if terms are wanted.
            with_loss: whether terms are wanted.

        Returns:
            With loss the sum of each term, (K,) float32, differentiable; else what the task calls its predictions.
        """


class TaskModel(BEiT3):
    """The layers of BEiT-3, the last of which ends with the head of a task.

    A head has its place in the list of layers and in the names of parameters (`heads.`), so that it is divided, saved
    and loaded as every other layer. With `tie_word_embeddings` and no embeddings among the layers, the head's word
    table is a buffer, to be filled by the stage that owns the table.
    """

    def __init__(
        self,
        build_head: Callable[[ModelConfig, TensorParallel], Head],
        config: ModelConfig,
        tensor: TensorParallel | None = None,
        layers: Sequence[range] | None = None,
        activation_checkpointing: ActivationCheckpointing = "none",
        kernels: Kernels = "triton",
        *,
        fp32_residual_connection: bool = False,
    ) -> None:
        """Builds the layers as `BEiT3` does, and the head if the last one is among them."""
        super().__init__(
            config, tensor, layers, activation_checkpointing, kernels, fp32_residual_connection=fp32_residual_connection
        )
        last = self.all_layers[-1]
        has_last = layers is None or any(last in chunk for chunk in layers)
        self.heads = build_head(config, self.tensor) if has_last else None
        self.tie_word_embeddings()

    def forward(  # type: ignore[override]
        self,
        batch: PackedBatch,
        loss_factors: Tensor | None,
        x_TD: Tensor | None = None,
        layers: range | None = None,
    ) -> Any:
        """Runs one micro-batch through all layers and the head, or through some layers that follow each other.

        Args:
            batch: the packed micro-batch, with targets if a loss is wanted.
            loss_factors: what the sum of each term is multiplied by, (K,) float32, that is weight / count of the whole
                step; None asks for predictions.
            x_TD: the stream before `layers`; None if they begin with the embeddings.
            layers: the layers to run; None is all of them.

        Returns:
            The stream after `layers`; if they end with the last one, a `LossOutput` or the head's predictions.
        """
        h_MD = self.run_layers(batch, x_TD, layers)
        if layers is not None and self.all_layers[-1] not in layers:
            return h_MD
        assert self.heads is not None, "this stage of the pipeline has no head"
        output = self.heads(h_MD, batch, loss_factors is not None)
        if loss_factors is None:
            return output
        return LossOutput((output * loss_factors).sum(), output.detach())

    def tie_word_embeddings(self) -> None:
        """Shares the word table with the head where the configuration says so."""
        table = self.tied_table
        if table is not None:
            table.tie_weight(None if self.embeddings is None else self.embeddings.word.weight)

    @property
    def tied_table(self) -> VocabParallelHead | None:
        """The layer of the head whose matrix is the word table; None where nothing is tied."""
        return self.heads.word_table if self.config.tie_word_embeddings and self.heads is not None else None
