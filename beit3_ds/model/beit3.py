"""Implements BEiT-3 as an ordered list of layers on a packed residual stream."""

# T packed rows, M rows that the head reads, D hidden.

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ActivationCheckpointing, DenseConfig, InputKind, ModelConfig
from beit3_ds.model.adaptation import AdaptedWeights, StoredWeights, fill_parameters
from beit3_ds.model.block import Block
from beit3_ds.model.dense.embeddings import DenseEmbeddings
from beit3_ds.model.embeddings import Embeddings, stream_dtype
from beit3_ds.model.features import Features, TokenIds, pack_inputs, unpack_features
from beit3_ds.model.multiway import MultiwayLayerNorm
from beit3_ds.model.pretrained import PretrainedWeights
from beit3_ds.parallel import TensorParallel


class BEiT3(nn.Module):
    """Implements the Multiway Transformer with its final norm (paper, section 2), or some of its layers.

    Layer 0 holds the embeddings, layers 1 to L are the blocks, and layer L + 1 holds the final norm. A task adds its
    head to layer L + 1. Layers pass on only the residual stream x_TD, so a pipeline can cut the model between any two
    layers.

    Modules store nothing about a batch, and the forward pass draws no random numbers. Parameter names do not depend on
    the layers that a rank holds. Parameters are uninitialized until `initialize_parameters` is called.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensor: TensorParallel | None = None,
        layers: Sequence[range] | None = None,
        activation_checkpointing: ActivationCheckpointing = "none",
        *,
        fp32_residual_connection: bool = False,
    ) -> None:
        """Builds the layers of this rank.

        Args:
            config: architecture of the model.
            tensor: the tensor-parallel group; None without tensor parallelism.
            layers: layers of this pipeline stage, as one range per model chunk. None builds all layers.
            activation_checkpointing: which activations the backward pass recomputes.
            fp32_residual_connection: whether the residual stream is float32 even if parameters are bf16.
        """
        super().__init__()
        self.config = config
        self.recompute_blocks = activation_checkpointing == "full"
        self.tensor = tensor or TensorParallel()
        self.all_layers = range(config.num_pipeline_layers)
        held = {layer for chunk in layers or [self.all_layers] for layer in chunk}
        self.fp32_residual_connection = fp32_residual_connection
        build_embeddings: Any = Embeddings if config.dense is None else DenseEmbeddings
        self.embeddings = (
            build_embeddings(config, self.tensor, fp32_residual_connection=fp32_residual_connection)
            if 0 in held
            else None
        )
        self.blocks = nn.ModuleDict(
            {str(i): Block(config, i, self.tensor) for i in range(config.num_layers) if i + 1 in held}
        )
        # With sequence parallelism the rows are gathered before this norm, so every rank has all rows.
        self.norm = (
            MultiwayLayerNorm(config.hidden_size, config.layer_norm_epsilon, config.attention_experts, TensorParallel())
            if self.all_layers[-1] in held and config.final_norm
            else None
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        image_size: int | None = None,
        patch_size: int | None = None,
        dense: DenseConfig | None = None,
        max_text_length: int | None = None,
        layout: Literal["shared", "decoupled"] | None = None,
        num_vision_language_layers: int | None = None,
        inputs: Sequence[InputKind] | None = None,
    ) -> Self:
        """Loads exported or imported weights as a model on one device, in evaluation mode.

        Parameters are filled one by one, so peak memory is close to one copy of the model. A task's head in the file is
        only loaded if the model class has this head. If the file lacks the head or the final norm, it gets initial
        values, and a warning lists its parameters.

        The arguments after `device` replace stored settings; None keeps the stored setting (`model.adaptation`).

        Args:
            path: .safetensors file or folder that `beit3 export` or `beit3 import` wrote.
            dtype: dtype of the parameters and of the computation.
            device: device of the parameters.
            image_size: side of the input images in pixels. Positions are interpolated.
            patch_size: side of a patch in pixels. The patch projection kernel is resampled.
            dense: settings of a backbone for images of any size; requires `inputs` = ("images",).
            max_text_length: maximum number of tokens per text. New positions get initial values.
            layout: "decoupled" copies the shared attention and norms for vision and for language.
            num_vision_language_layers: number of top blocks with a vision-language expert. New experts are copies of
                the vision experts.
            inputs: kinds of input that the model accepts, a subset of "images", "pairs" and "texts". Tensors that only
                other inputs need are neither built nor read. ("images",) gives a vision encoder.

        Raises:
            ConfigError: if the weights do not exist, do not match their configuration, or cannot be adapted.
        """
        settings: dict[str, Any] = {
            "image_size": image_size,
            "patch_size": patch_size,
            "dense": dense,
            "max_text_length": max_text_length,
            "layout": layout,
            "num_vision_language_layers": num_vision_language_layers,
            "inputs": inputs,
        }
        return cls.from_weights(PretrainedWeights(path), cls, settings, dtype=dtype, device=device)

    @classmethod
    def from_weights(
        cls,
        stored: StoredWeights,
        build: Callable[[ModelConfig], Self],
        settings: Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Builds a model in evaluation mode, and fills it with stored weights adapted to new settings.

        Args:
            stored: weights on disk.
            build: function that builds the model, for example a `TaskModel` with a head, from a configuration.
            settings: new values of configuration fields, by name. For a field with the value None, the stored value is
                kept.
            dtype: dtype of the parameters and of the computation.
            device: device of the parameters.

        Raises:
            ConfigError: if the weights do not match their configuration, or cannot be adapted to the settings.
        """
        changes = {name: value for name, value in settings.items() if value is not None}
        weights = AdaptedWeights(stored, dataclasses.replace(stored.model, **changes), str(stored.path))
        with torch.device("meta"):
            model = build(weights.model).to(dtype)
        model.to_empty(device=device)
        model.tie_word_embeddings()  # to_empty unties shared parameters
        fill_parameters(model, weights)
        return model.eval()

    def encode(
        self,
        images: Tensor | None = None,
        texts: Sequence[TokenIds] | None = None,
        pairs: tuple[Tensor, Sequence[TokenIds]] | None = None,
    ) -> Features:
        """Computes the features of images, texts and pairs in one packed batch. Supports gradients.

        Args:
            images: RGB images, (images, 3, image_size, image_size) floats in [-1, 1].
            texts: token ids of each text, including BOS and EOS; at most `max_text_length` ids.
            pairs: images as above, and the token ids of one caption per image.

        Returns:
            Features after the final norm; empty tensors for kinds of input that are not given.

        Raises:
            ConfigError: if no input is given, or an input's image size, text length or token ids are invalid.
        """
        assert self.embeddings is not None, "a stage of a pipeline cannot encode alone"
        batch = pack_inputs(self.config, images, texts, pairs, next(self.embeddings.parameters()).device)
        return unpack_features(self.run_layers(batch), batch)

    def forward(self, batch: PackedBatch, x_TD: Tensor | None = None, layers: range | None = None) -> Tensor:
        """Runs one micro-batch through all layers, or through the consecutive layers in `layers` (`run_layers`)."""
        return self.run_layers(batch, x_TD, layers)

    def run_layers(self, batch: PackedBatch, x_TD: Tensor | None = None, layers: range | None = None) -> Tensor:
        """Runs one micro-batch through all layers, or through the consecutive layers in `layers`.

        Layer 0 is the embeddings. The blocks follow. The last layer selects the rows for the head, gathers them from
        the tensor-parallel ranks, and applies the final norm if `ModelConfig.final_norm` is true.

        Args:
            batch: the packed micro-batch.
            x_TD: this rank's rows of the residual stream before `layers`; None if `layers` starts with layer 0.
            layers: layers to run; None runs all layers.

        Returns:
            If `layers` does not contain the last layer: this rank's rows of the residual stream, (T, D). If `layers`
                contains the last layer: the rows after the last layer, equal on all tensor-parallel ranks. If
                `PackedBatch.head_rows` is set, these are the M rows that `head_rows` lists, (M, D). If `head_rows` is
                not set, these are all rows of the micro-batch.
        """
        layers = layers or self.all_layers
        if layers.start == 0:
            assert self.embeddings is not None, "this stage of the pipeline does not embed"
            x_TD = self.embeddings(batch)
        assert x_TD is not None, f"layers {layers} need the stream before them"
        last = self.all_layers[-1]
        blocks = range(max(layers.start, 1), min(layers.stop, last))
        # If the last block runs together with the head, it computes only the rows that the head reads.
        picks_rows = len(blocks) > 0 and last in layers and batch.picked_rows is not None
        for layer in blocks:
            x_TD = self._run_block(self.blocks[str(layer - 1)], x_TD, batch, picks_rows and layer == blocks[-1])
        return self._finish(x_TD, batch, has_picked=picks_rows) if last in layers else x_TD

    @property
    def stream_dtype(self) -> torch.dtype:
        """Returns the dtype of the residual stream x_TD."""
        dtype = next(self.parameters()).dtype
        return stream_dtype(dtype) if self.fp32_residual_connection else dtype

    def tie_word_embeddings(self) -> None:
        """Does nothing, because the backbone has no head.

        `TaskModel` overrides this method to make the word table the weight of the head.
        """

    def _run_block(self, block: nn.Module, x_TD: Tensor, batch: PackedBatch, only_head_rows: bool) -> Tensor:
        if self.recompute_blocks and torch.is_grad_enabled():
            return checkpoint(block, x_TD, batch, only_head_rows, use_reentrant=False, preserve_rng_state=False)
        return block(x_TD, batch, only_head_rows)

    def _finish(self, x_TD: Tensor, batch: PackedBatch, *, has_picked: bool) -> Tensor:
        """Gathers the rows that the head reads, (M, D), and applies the final norm. If the head reads all rows, M is T.

        Args:
            x_TD: this rank's rows of the residual stream.
            batch: the packed micro-batch.
            has_picked: whether the residual stream already has only the rows that the head reads.
        """
        picked = batch.picked_rows
        rows = batch if picked is None else picked
        x_MD = self.tensor.gather_rows(x_TD, rows.num_rows if has_picked else batch.num_rows)
        if picked is not None and not has_picked:
            x_MD = x_MD.index_select(0, picked.rows)
        if self.norm is None:
            return x_MD.to(next(self.parameters()).dtype)  # the norm would return the parameters' dtype too
        return self.norm(x_MD, rows.expert_slices(self.config.attention_experts)).h_TD
