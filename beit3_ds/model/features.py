"""Images, texts and pairs in, features out: what a trained model is asked for outside of training."""

# I images, P pairs, X texts, N patches an image, L tokens of a text, D hidden, S image size.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ConfigError, ModelConfig

TokenIds = Sequence[int] | Tensor
"""The ids of one text, BOS and EOS included."""


class Features(NamedTuple):
    """The last layer's output after the final norm."""

    images: Tensor
    """(I, 1 + N, D): CLS, then the patches row by row."""
    texts: tuple[Tensor, ...]
    """(L, D) of each text; the first row is BOS, the text's CLS."""
    pair_images: Tensor
    """(P, 1 + N, D) of the pairs' images, which saw their captions."""
    pair_texts: tuple[Tensor, ...]
    """(L, D) of each caption, which saw its image."""


def pack_inputs(
    config: ModelConfig,
    images: Tensor | None,
    texts: Sequence[TokenIds] | None,
    pairs: tuple[Tensor, Sequence[TokenIds]] | None,
    device: torch.device,
) -> PackedBatch:
    """Packs inputs as they are onto `device`, with nothing masked and nothing dropped; see `BEiT3.encode`.

    Raises:
        ConfigError: if there are no inputs, or one has another size, length or ids than the model's.
    """
    pair_images, captions = pairs if pairs is not None else (None, ())
    pixels = [_check_pixels(config, name, x) for name, x in (("images", images), ("pairs", pair_images))]
    caption_ids = [_check_text(config, f"pairs, caption {i}", ids) for i, ids in enumerate(captions)]
    text_ids = [_check_text(config, f"texts, text {i}", ids) for i, ids in enumerate(texts or ())]
    num_images, num_pairs = (len(part) for part in pixels)
    if num_pairs != len(caption_ids):
        raise ConfigError(f"pairs: {num_pairs} images and {len(caption_ids)} captions. Give one caption an image.")
    if not num_images + num_pairs + len(text_ids):
        raise ConfigError("nothing to encode. Give images, texts or pairs.")
    nothing = torch.empty(0, dtype=torch.int64)
    return PackedBatch(
        num_images=num_images,
        num_pairs=num_pairs,
        caption_lengths=tuple(map(len, caption_ids)),
        text_lengths=tuple(map(len, text_ids)),
        pixels=torch.cat([part.to(device) for part in pixels]),
        tokenizer_pixels=None,
        patch_mask=torch.zeros(num_images + num_pairs, config.num_patches, dtype=torch.bool),
        token_ids=torch.cat([nothing, *caption_ids, *text_ids]),
        masked_tokens=nothing,
        target_ids=nothing,
    ).to(device)


def unpack_features(h_TD: Tensor, batch: PackedBatch) -> Features:
    """Cuts normalised rows, (T, D), into samples."""
    a, b, c, _ = batch.boundaries
    images, pair_images, captions, texts = h_TD.tensor_split([a, b, c])
    shape = (-1, batch.image_length, h_TD.shape[1])
    return Features(
        images.reshape(shape),
        texts.split(batch.text_lengths),
        pair_images.reshape(shape),
        captions.split(batch.caption_lengths),
    )


def _check_pixels(config: ModelConfig, name: str, pixels: Tensor | None) -> Tensor:
    shape = (3, config.image_size, config.image_size)
    if pixels is None:
        return torch.empty(0, *shape)
    if pixels.dim() != 4 or pixels.shape[1:] != shape:
        raise ConfigError(
            f"{name}: pixels of shape {tuple(pixels.shape)}, but the model takes (number, 3, {shape[1]}, {shape[2]}). "
            f"Resize them, or load the model with image_size=PIXELS, which interpolates its positions."
        )
    if not pixels.is_floating_point():
        raise ConfigError(f"{name}: pixels are {pixels.dtype}. Scale them to floats in [-1, 1].")
    return pixels


def _check_text(config: ModelConfig, name: str, ids: TokenIds) -> Tensor:
    tokens = torch.as_tensor(ids)
    if tokens.dim() != 1 or tokens.is_floating_point() or not 1 <= len(tokens) <= config.max_text_length:
        raise ConfigError(
            f"{name}: {tokens.dtype} of shape {tuple(tokens.shape)}. Give a list of 1 to max_text_length="
            f"{config.max_text_length} token ids, BOS and EOS included."
        )
    if tokens.min() < 0 or tokens.max() >= config.text_vocab_size:
        raise ConfigError(
            f"{name}: ids from {int(tokens.min())} to {int(tokens.max())}, but the vocabulary is "
            f"[0, {config.text_vocab_size}). Use the tokenizer that the model was trained with."
        )
    return tokens.to("cpu", torch.int64)
