"""Adds a task's head to BEiT-3. The head computes loss terms or predictions."""

# T packed rows, M rows that the head reads, D hidden.

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ActivationCheckpointing, ModelConfig
from beit3_ds.model.beit3 import BEiT3
from beit3_ds.model.initialization import initialize_parameters, parameter_generator
from beit3_ds.model.stage_model import LossOutput, StageModel
from beit3_ds.model.step_features import StepFeatures
from beit3_ds.parallel import TensorParallel, VocabParallelHead, logical_part, logical_shape, own_part


class Head(nn.Module, ABC):
    """Computes a task's loss terms or predictions after the model's final norm."""

    @property
    def word_layer(self) -> VocabParallelHead | None:
        """Returns the layer that predicts words (the word layer), or None if the head has no such layer.

        The weight of the word layer may be tied to the word embedding.
        """
        return None

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """Returns the initial value of a parameter, float32 on the CPU; None if `initialize_parameters` sets it.

        Args:
            name: name of the parameter within the head.
            shape: logical shape of the parameter.
            generator: random generator for this parameter.
        """
        return None

    @abstractmethod
    def forward(self, h_MD: Tensor, batch: PackedBatch, with_loss: bool) -> Any:
        """Computes the sum of each loss term, or the task's predictions.

        Args:
            h_MD: rows that the head reads, after the final norm; equal on all tensor-parallel ranks.
            batch: the packed micro-batch, including the task's targets if `with_loss` is True.
            with_loss: whether to return loss terms instead of predictions.

        Returns:
            Without loss, the task's predictions. With loss, one differentiable float32 sum per loss term. A head whose
            loss compares samples with each other, such as a contrastive loss, returns `StepFeatures` instead of sums.
        """


class TaskModel(BEiT3, StageModel):
    """Extends BEiT-3 with a task's head. The head belongs to the last layer, like the final norm.

    The names of the head's parameters begin with `heads.`. These parameters are split, saved and loaded like all
    others. With `ModelConfig.tie_word_embeddings`, the weight of the head's word layer is the word embedding. If
    another pipeline stage holds the word embedding, this weight is a buffer that receives the word embedding from that
    stage.
    """

    def __init__(
        self,
        build_head: Callable[[ModelConfig, TensorParallel], Head],
        config: ModelConfig,
        tensor: TensorParallel | None = None,
        layers: Sequence[range] | None = None,
        activation_checkpointing: ActivationCheckpointing = "none",
        *,
        fp32_residual_connection: bool = False,
    ) -> None:
        """Builds the layers of this rank, including the head if the last layer is one of them.

        Args:
            build_head: function that builds the head from a configuration and a tensor-parallel group.
            config: architecture of the model.
            tensor: the tensor-parallel group; None without tensor parallelism.
            layers: layers of this pipeline stage, as one range per model chunk. None builds all layers.
            activation_checkpointing: which activations the backward pass recomputes.
            fp32_residual_connection: whether the residual stream is float32 even if parameters are bf16.
        """
        super().__init__(
            config, tensor, layers, activation_checkpointing, fp32_residual_connection=fp32_residual_connection
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
        """Runs one micro-batch through all layers and the head, or through the consecutive layers in `layers`.

        For arguments and results see `StageModel.forward`.
        """
        h_MD = self.run_layers(batch, x_TD, layers)
        if layers is not None and self.all_layers[-1] not in layers:
            return h_MD
        assert self.heads is not None, "this stage of the pipeline has no head"
        output = self.heads(h_MD, batch, loss_factors is not None)
        if loss_factors is None or isinstance(output, StepFeatures):
            return output
        return LossOutput((output * loss_factors).sum(), output.detach())

    def initialize(self, seed: int) -> None:
        """Fills each parameter with its initial value (`Head.initial_value`, `initialize_parameters`)."""
        initialize_parameters(self, self.config, seed)
        if self.heads is None:
            return
        with torch.no_grad():
            for name, parameter in self.heads.named_parameters():
                generator = parameter_generator(seed, f"heads.{name}")
                value = self.heads.initial_value(name, logical_shape(parameter), generator)
                if value is not None:
                    logical_part(parameter).copy_(own_part(parameter, value))

    @property
    def stream_size(self) -> int:
        """Returns the width of the residual stream, which is the hidden size."""
        return self.config.hidden_size

    @property
    def tied_embedding(self) -> nn.Parameter | None:
        """Returns the word embedding if it is tied to the head's word layer and this stage holds it, and None
        otherwise.
        """
        if not self.config.has_tied_embedding or self.embeddings is None:
            return None
        return self.embeddings.word.weight

    def tie_word_embeddings(self) -> None:
        """Ties the weight of the head's word layer to the word embedding, if `has_tied_embedding` is true."""
        table = self.tied_word_layer
        if table is not None:
            table.tie_weight(None if self.embeddings is None else self.embeddings.word.weight)

    @property
    def tied_word_layer(self) -> VocabParallelHead | None:
        """Returns the head's word layer if its weight is tied to the word embedding; None if this stage has no such
        layer.
        """
        return self.heads.word_layer if self.config.has_tied_embedding and self.heads is not None else None
