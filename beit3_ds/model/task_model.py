"""Adds the head of a task, which computes the sums of its loss terms, to BEiT-3."""

# T packed rows, M rows that the head reads, D hidden, K terms.

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ActivationCheckpointing, Kernels, ModelConfig
from beit3_ds.model.beit3 import BEiT3
from beit3_ds.model.initialization import initialize_parameters
from beit3_ds.model.stage_model import LossOutput, StageModel
from beit3_ds.model.step_features import StepFeatures
from beit3_ds.parallel import TensorParallel, VocabParallelHead


class Head(nn.Module, ABC):
    """Computes the terms or the predictions of a task, as the last layer of its model."""

    @property
    def word_table(self) -> VocabParallelHead | None:
        """Returns the layer whose weight is the word table under `tie_word_embeddings`; None if there is none."""
        return None

    @abstractmethod
    def forward(self, h_MD: Tensor, batch: PackedBatch, with_loss: bool) -> Any:
        """Returns the sums of the task's terms, or its predictions.

        Args:
            h_MD: normalised rows that the head reads, (M, D), the same on all tensor-parallel ranks.
            batch: the packed micro-batch, with the task's targets if `with_loss`.
            with_loss: whether to return the sums of terms.

        Returns:
            With loss the sum of each term, (K,) float32, differentiable, or the `StepFeatures` of a task whose terms
            compare samples; otherwise the predictions of the task.
        """


class TaskModel(BEiT3, StageModel):
    """Extends BEiT-3 with the head of a task, at the end of the last layer.

    The head is part of the last layer, and its parameters have the prefix `heads.`. So it is split, saved and loaded
    like every other layer. With `tie_word_embeddings` and no embeddings on this stage, the word table of the head is a
    buffer, which the stage that owns the table fills.
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
        """Builds the layers as `BEiT3` does, and the head if the last layer is among them."""
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
        """Runs one micro-batch through all layers and the head, or through consecutive layers (`StageModel`)."""
        h_MD = self.run_layers(batch, x_TD, layers)
        if layers is not None and self.all_layers[-1] not in layers:
            return h_MD
        assert self.heads is not None, "this stage of the pipeline has no head"
        output = self.heads(h_MD, batch, loss_factors is not None)
        if loss_factors is None or isinstance(output, StepFeatures):
            return output
        return LossOutput((output * loss_factors).sum(), output.detach())

    def initialize(self, seed: int) -> None:
        """Fills every parameter with its initial value (`initialize_parameters`)."""
        initialize_parameters(self, self.config, seed)

    @property
    def stream_size(self) -> int:
        """Returns the width of the stream between layers."""
        return self.config.hidden_size

    @property
    def owned_table(self) -> nn.Parameter | None:
        """Returns the word table with `tie_word_embeddings`, on the stage that embeds; None elsewhere."""
        if not self.config.has_tied_table or self.embeddings is None:
            return None
        return self.embeddings.word.weight

    def tie_word_embeddings(self) -> None:
        """Shares the word table with the head if `tie_word_embeddings` is set."""
        table = self.tied_table
        if table is not None:
            table.tie_weight(None if self.embeddings is None else self.embeddings.word.weight)

    @property
    def tied_table(self) -> VocabParallelHead | None:
        """Returns the head's layer whose weight is tied to the word table; None if no layer is."""
        return self.heads.word_table if self.config.has_tied_table and self.heads is not None else None
