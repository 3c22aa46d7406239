"""BEiT-3: an ordered list of layers over one packed stream."""

# T packed rows, D hidden, V vocabulary.

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ActivationCheckpointing, Kernels, ModelConfig
from beit3_ds.model.adaptation import AdaptedWeights, fill_parameters
from beit3_ds.model.block import Block
from beit3_ds.model.embeddings import Embeddings, stream_dtype
from beit3_ds.model.features import Features, TokenIds, pack_inputs, unpack_features
from beit3_ds.model.heads import Heads
from beit3_ds.model.kernel_backend import select_kernels
from beit3_ds.model.pretrained import PretrainedWeights
from beit3_ds.parallel import TensorParallel


class LossOutput(NamedTuple):
    """The loss of one micro-batch."""

    total: Tensor
    """Weighted sum to differentiate, float32 scalar."""
    sums: Tensor
    """Sum of cross entropies of each of `batch.LOSS_TERMS`, (4,) float32, detached."""


class Logits(NamedTuple):
    """Scores at the masked positions of one micro-batch."""

    visual: Tensor
    """(masked patches, visual vocabulary)."""
    text: Tensor
    """(masked tokens, text vocabulary)."""


class BEiT3(nn.Module):
    """The Multiway Transformer with its masked-modeling heads (paper section 2), or some of its layers.

    Layer 0 embeds, layers 1 to L are blocks and layer L + 1 is the heads (`ModelConfig.num_pipeline_layers` in all).
    They hand on nothing but the stream x_TD, so the list can be cut anywhere. Modules keep no state of a batch, and the
    forward pass draws nothing random. A parameter's name is the same whichever layers stand beside it. Parameters are
    uninitialised until `initialize_parameters`. With `tie_word_embeddings` and no embeddings among the layers, the MLM
    head's matrix is a buffer, to be filled by who holds the word table.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensor: TensorParallel | None = None,
        layers: Sequence[range] | None = None,
        activation_checkpointing: ActivationCheckpointing = "none",
        kernels: Kernels = "triton",
        *,
        fp32_residual_connection: bool = False,
    ) -> None:
        """Builds the layers.

        Args:
            config: sizes and layout.
            tensor: the ranks that divide every layer; None is this process alone.
            layers: the runs of layers of a pipeline stage; None is all of them.
            activation_checkpointing: activations that the backward pass recomputes.
            kernels: GPU kernel backend; "cuda" must have been built.
            fp32_residual_connection: whether the stream between the layers stays float32 with bf16 parameters.
        """
        super().__init__()
        self.config = config
        self.recompute_blocks = activation_checkpointing == "full"
        tensor = tensor or TensorParallel()
        self._all_layers = range(config.num_pipeline_layers)
        held = {layer for run in layers or [self._all_layers] for layer in run}
        self.fp32_residual_connection = fp32_residual_connection
        self.embeddings = (
            Embeddings(config, tensor, fp32_residual_connection=fp32_residual_connection) if 0 in held else None
        )
        self.blocks = nn.ModuleDict(
            {str(i): Block(config, i, tensor) for i in range(config.num_layers) if i + 1 in held}
        )
        self.heads = Heads(config, tensor) if self._all_layers[-1] in held else None
        select_kernels(self, kernels)
        self._tie_word_embeddings()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        image_size: int | None = None,
        max_text_length: int | None = None,
        layout: Literal["shared", "decoupled"] | None = None,
        num_vision_language_layers: int | None = None,
    ) -> Self:
        """Loads exported or imported weights as a plain model of one device, in evaluation mode.

        Parameters are filled one by one, so that memory stays near one copy of the model. Heads that the file lacks,
        as fine-tuned releases do, get their initial values, and a warning names them.

        Args:
            path: what `beit3 export` or `beit3 import` wrote: a .safetensors file, or a folder of them.
            dtype: dtype of the parameters and of the computation.
            device: device of the parameters.
            image_size: pixels on a side of the input images; positions are interpolated. None keeps the file's value,
                here and for the settings below. `model.adaptation` lists how weights are adapted.
            max_text_length: tokens of the longest input text; added positions have initial values.
            layout: "decoupled" gives vision and language copies of shared attention and norms.
            num_vision_language_layers: top blocks with a vision-language expert; a new one is a copy of the vision one.

        Raises:
            ConfigError: if there are no such weights, their tensors do not match their configuration, or they cannot be
                adapted to the settings.
        """
        stored = PretrainedWeights(path)
        settings: dict[str, Any] = {
            "image_size": image_size,
            "max_text_length": max_text_length,
            "layout": layout,
            "num_vision_language_layers": num_vision_language_layers,
        }
        changes = {name: value for name, value in settings.items() if value is not None}
        weights = AdaptedWeights(stored, dataclasses.replace(stored.model, **changes), str(path))
        with torch.device("meta"):
            model = cls(weights.model).to(dtype)
        model.to_empty(device=device)
        model._tie_word_embeddings()  # to_empty gives every module a parameter of its own
        fill_parameters(model, weights)
        return model.eval()

    def encode(
        self,
        images: Tensor | None = None,
        texts: Sequence[TokenIds] | None = None,
        pairs: tuple[Tensor, Sequence[TokenIds]] | None = None,
    ) -> Features:
        """Computes the features of images, texts and pairs, all in one packed stream; gradients flow through it.

        Args:
            images: (I, 3, image_size, image_size) floats in [-1, 1], RGB.
            texts: the ids of each text, BOS and EOS included; at most `max_text_length` ids.
            pairs: images as above, and the ids of one caption each.

        Returns:
            Features after the final norm; those of a kind that was not given are empty.

        Raises:
            ConfigError: if there are no inputs, or one has another size, length or ids than the model's.
        """
        assert self.embeddings is not None and self.heads is not None, "a stage of a pipeline cannot encode alone"
        batch = pack_inputs(self.config, images, texts, pairs, self.embeddings.cls_token.device)
        x_TD = self(batch, None, layers=self._all_layers[:-1])
        return unpack_features(self.heads.normalize(x_TD, batch), batch)

    def forward(
        self,
        batch: PackedBatch,
        loss_factors: Tensor | None,
        x_TD: Tensor | None = None,
        layers: range | None = None,
    ) -> LossOutput | Logits | Tensor:
        """Runs one micro-batch through all layers, or through some that follow each other.

        Args:
            batch: the packed micro-batch, with visual targets if a loss is wanted.
            loss_factors: what each of `batch.LOSS_TERMS` is multiplied by, (4,) float32, that is weight / count of the
                whole step; None asks for logits.
            x_TD: the stream before `layers`; None if they begin with the embeddings.
            layers: the layers to run; None is all of them.

        Returns:
            The stream after `layers`, or the loss or the logits at masked positions if they end with the heads.
        """
        layers = layers or self._all_layers
        if layers.start == 0:
            assert self.embeddings is not None, "this stage of the pipeline does not embed"
            x_TD = self.embeddings(batch)
        heads = self._all_layers[-1]
        blocks = range(max(layers.start, 1), min(layers.stop, heads))
        # The heads read masked rows only, so a last block that runs with them need not make the others.
        cuts_rows = len(blocks) > 0 and heads in layers
        for layer in blocks:
            only_masked = cuts_rows and layer == blocks[-1]
            x_TD = self._run_block(self.blocks[str(layer - 1)], x_TD, batch, only_masked)
        if heads not in layers:
            assert x_TD is not None, f"no layers in {layers}"
            return x_TD
        assert self.heads is not None, "this stage of the pipeline has no heads"
        visual, text = self.heads(x_TD, batch, loss_factors is not None, only_masked=cuts_rows)
        if loss_factors is None:
            return Logits(visual, text)
        sums = _sum_terms(visual, text, batch)
        return LossOutput((sums * loss_factors).sum(), sums.detach())

    @property
    def stream_dtype(self) -> torch.dtype:
        """Dtype of the stream x_TD between the layers."""
        dtype = next(self.parameters()).dtype
        return stream_dtype(dtype) if self.fp32_residual_connection else dtype

    def _tie_word_embeddings(self) -> None:
        if self.config.tie_word_embeddings and self.heads is not None:
            self.heads.mlm.tie_weight(None if self.embeddings is None else self.embeddings.word.weight)

    def _run_block(self, block: nn.Module, x_TD: Tensor | None, batch: PackedBatch, only_masked: bool) -> Tensor:
        if self.recompute_blocks and torch.is_grad_enabled():
            return checkpoint(block, x_TD, batch, only_masked, use_reentrant=False, preserve_rng_state=False)
        return block(x_TD, batch, only_masked)


def _sum_terms(visual_losses: Tensor, text_losses: Tensor, batch: PackedBatch) -> Tensor:
    image_mim, text_mlm, pair_mim, pair_mlm = batch.num_masked
    images, pairs = visual_losses.split([image_mim, pair_mim])
    captions, texts = text_losses.split([pair_mlm, text_mlm])
    return torch.stack([images.sum(), texts.sum(), pairs.sum(), captions.sum()])
