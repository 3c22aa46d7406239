"""Embeds image patches and text tokens, with their positions, as rows of the residual stream."""

# T packed rows, D hidden, B images with pixels, N patches per image, P values per patch, S text tokens.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ConfigError, ModelConfig
from beit3_ds.parallel import TensorParallel, VocabParallelEmbedding
from beit3_ds.pixels import to_floats


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a residual stream in full precision: float32, or float64 if `dtype` is float64."""
    return torch.promote_types(dtype, torch.float32)


class PatchProjection(nn.Conv2d):
    """Projects non-overlapping image patches by a matrix product that is equivalent to a strided convolution."""

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Returns the embeddings of each image's patches in row-major order, (images, patches, hidden size)."""
        size = self.kernel_size[0]
        patches = pixels_BCHW.to(self.weight.dtype).unflatten(3, (-1, size)).unflatten(2, (-1, size))
        rows_BNP = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(rows_BNP, self.weight.flatten(1), self.bias)


class Embeddings(nn.Module):
    """Embeds images (CLS and projected patches) and texts (word embedding), and adds learned positions.

    Masked patches are replaced by the mask token. Each modality has its own position table, so the positions of a
    pair's image and caption each start at 0. BOS serves as a text's CLS token. There is no token-type embedding,
    because experts already distinguish the modalities.

    The vocabulary of the word embedding is split over the tensor-parallel group, and the forward pass all-reduces the
    embeddings of all text tokens. Each rank embeds the whole micro-batch. With sequence parallelism, a rank then keeps
    only its part of the rows (`TensorParallel.scatter_rows`). Parameters are built only for the modalities of
    `ModelConfig.inputs`.
    """

    def __init__(self, config: ModelConfig, tensor: TensorParallel, *, fp32_residual_connection: bool = False) -> None:
        super().__init__()
        self.fp32_residual_connection = fp32_residual_connection
        hidden, self.tensor, self.config = config.hidden_size, tensor, config
        if "vision" in config.modalities:
            self.patch = PatchProjection(3, hidden, kernel_size=config.patch_size, stride=config.patch_size)
            self.cls_token = nn.Parameter(torch.empty(hidden))
            self.mask_token = nn.Parameter(torch.empty(hidden))
            self.image_position = nn.Parameter(torch.empty(1 + config.num_patches, hidden))
        if "language" in config.modalities:
            self.word = VocabParallelEmbedding(config.text_vocab_size, hidden, tensor)
            self.text_position = nn.Parameter(torch.empty(config.max_text_length, hidden))

    def forward(self, batch: PackedBatch) -> Tensor:
        """Embeds a batch, and returns this rank's rows of the residual stream: image rows, then text rows.

        Raises:
            ConfigError: if the batch has a kind of input that the model does not accept.
        """
        check_inputs(self.config, batch)
        parts = [self._embed_images(batch)] if "vision" in self.config.modalities else []
        parts += [self._embed_texts(batch)] if "language" in self.config.modalities else []
        x_TD = self.tensor.scatter_rows(torch.cat(parts))
        return x_TD.to(stream_dtype(x_TD.dtype)) if self.fp32_residual_connection else x_TD

    def _embed_images(self, batch: PackedBatch) -> Tensor:
        assert batch.pixels is not None, "the batch has no model's view: another stage of the pipeline reads it"
        x_BND = self.patch(to_floats(batch.pixels, batch.colors))
        x_BND = torch.where(batch.patch_mask.unsqueeze(2), self.mask_token, x_BND)
        cls_B1D = self.cls_token.expand(len(x_BND), 1, -1)
        return (torch.cat([cls_B1D, x_BND], dim=1) + self.image_position).flatten(0, 1)

    def _embed_texts(self, batch: PackedBatch) -> Tensor:
        return self.embed_tokens(batch.token_ids, batch.text_positions)

    def embed_tokens(self, ids_S: Tensor, positions_S: Tensor) -> Tensor:
        """Returns the sum of word embedding and position embedding of each token, (tokens, hidden size)."""
        # Without texts, index_select takes zero rows and gives the tables zero gradients, which ZeRO-3 needs.
        return self.word(ids_S) + self.text_position.index_select(0, positions_S)


def check_inputs(config: ModelConfig, batch: PackedBatch) -> None:
    """Checks that a model accepts all kinds of input (images, pairs, texts) in a batch.

    Raises:
        ConfigError: if the model does not accept a kind of input; the message names the kind.
    """
    counts = {"images": batch.num_images, "pairs": batch.num_pairs, "texts": batch.num_texts}
    for kind, count in counts.items():
        if count and kind not in config.inputs:
            raise ConfigError(
                f"the batch has {count} {kind}, but the model takes {' and '.join(config.inputs)} alone "
                f"(model.inputs). Give it no {kind}, or load or train a model whose inputs include them."
            )
