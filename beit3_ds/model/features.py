"""Packs images, texts and pairs into a batch for inference, and splits the output into features per input."""

# I images, P pairs, X texts, N patches per image, L tokens of a text, D hidden, S image size.

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ConfigError, ModelConfig

_LARGEST_PIXEL = 8.0
"""Largest absolute pixel value that is accepted. Larger values mean that the pixels were not normalized. The limit
exceeds 1, because adversarial or optimized images may leave [-1, 1]."""
_PIXEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN_LETTERS = 60
_TOKENISE = "A text becomes [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]."

TokenIds = Sequence[int] | Tensor
"""Token ids of one text, including BOS and EOS."""


class Features(NamedTuple):
    """Holds the features of images, texts and pairs after the final norm."""

    images: Tensor
    """Features of each image, (images, 1 + patches, hidden size): CLS, then the patches in row-major order."""
    texts: tuple[Tensor, ...]
    """Features of each text, (tokens, hidden size). The first row, BOS, serves as CLS."""
    pair_images: Tensor
    """Features of each pair's image, (pairs, 1 + patches, hidden size). The image attends to its caption."""
    pair_texts: tuple[Tensor, ...]
    """Features of each pair's caption, (tokens, hidden size). The caption attends to its image."""


def pack_inputs(
    config: ModelConfig,
    images: Tensor | None,
    texts: Sequence[TokenIds] | None,
    pairs: tuple[Tensor, Sequence[TokenIds]] | None,
    device: torch.device,
) -> PackedBatch:
    """Checks the inputs of `BEiT3.encode`, and packs them into one batch on `device`, without masked patches.

    Raises:
        ConfigError: if no input is given, or an input's image size, text length or token ids are invalid.
    """
    pair_images, captions = _check_pairs(pairs)
    pixels = [_check_pixels(config, name, x) for name, x in (("images", images), ("pairs", pair_images))]
    caption_ids = _check_texts(config, "pairs, caption", captions)
    text_ids = _check_texts(config, "texts, text", texts)
    num_images, num_pairs = (len(part) for part in pixels)
    if num_pairs != len(caption_ids):
        raise ConfigError(f"pairs: {num_pairs} images and {len(caption_ids)} captions. Give one caption per image.")
    if not num_images + num_pairs + len(text_ids):
        raise ConfigError("nothing to encode. Give images, texts or pairs.")
    nothing = torch.empty(0, dtype=torch.int64)
    return PackedBatch(
        num_images=num_images,
        num_pairs=num_pairs,
        caption_lengths=tuple(map(len, caption_ids)),
        text_lengths=tuple(map(len, text_ids)),
        pixels=torch.cat([part.to(device) for part in pixels]),
        patch_mask=torch.zeros(num_images + num_pairs, config.num_patches, dtype=torch.bool),
        token_ids=torch.cat([nothing, *caption_ids, *text_ids]),
    ).to(device)


def unpack_features(h_TD: Tensor, batch: PackedBatch) -> Features:
    """Splits the rows after the final norm into the features of each image, text and pair."""
    a, b, c, _ = batch.boundaries
    images, pair_images, captions, texts = h_TD.tensor_split([a, b, c])
    shape = (-1, batch.image_length, h_TD.shape[1])
    return Features(
        images.reshape(shape),
        texts.split(batch.text_lengths),
        pair_images.reshape(shape),
        captions.split(batch.caption_lengths),
    )


def _check_pairs(pairs: Any) -> tuple[Any, Any]:
    if pairs is None:
        return None, None
    if not isinstance(pairs, tuple | list) or len(pairs) != 2 or any(part is None for part in pairs):
        raise ConfigError(
            f"pairs: {_describe(pairs)}. Give (images, captions): pixels as for `images`, and the token ids of one "
            "caption per image."
        )
    return pairs[0], pairs[1]


def _check_pixels(config: ModelConfig, name: str, pixels: Any) -> Tensor:
    shape = (3, config.image_size, config.image_size)
    if pixels is None:
        return torch.empty(0, *shape)
    wanted = f"(number, 3, {shape[1]}, {shape[2]})"
    if not isinstance(pixels, Tensor):
        raise ConfigError(
            f"{name}: {_describe(pixels)}, but pixels are a tensor {wanted} of floats in [-1, 1]. Prepare each image "
            "with beit3_ds.preprocess.preprocess(image, model.config.image_size), and stack them with torch.stack."
        )
    if pixels.layout != torch.strided or pixels.is_meta or pixels.is_nested:
        raise ConfigError(
            f"{name}: a {pixels.layout} tensor on {pixels.device} has no pixels to read; give a dense one."
        )
    if pixels.dim() != 4 or pixels.shape[1:] != shape:
        one = " One image is images[None]." if pixels.shape == shape else ""
        raise ConfigError(
            f"{name}: pixels of shape {tuple(pixels.shape)}, but the model takes {wanted}.{one} Resize them with "
            "beit3_ds.preprocess, or load the model with image_size=PIXELS, which interpolates its positions."
        )
    if pixels.dtype not in _PIXEL_DTYPES:
        raise ConfigError(f"{name}: pixels are {pixels.dtype}. Scale them to floats in [-1, 1].")
    if len(pixels):
        low, high = (float(x) for x in pixels.detach().aminmax())
        if not (low >= -_LARGEST_PIXEL and high <= _LARGEST_PIXEL):  # NaN as well
            raise ConfigError(
                f"{name}: pixels from {low:g} to {high:g}, but the model takes [-1, 1]. "
                "Scale them with beit3_ds.preprocess."
            )
    return pixels


def _check_texts(config: ModelConfig, name: str, texts: Any) -> list[Tensor]:
    if texts is None:
        return []
    if isinstance(texts, str | bytes) or not isinstance(texts, Sequence | Tensor | np.ndarray):
        raise ConfigError(f"{name}s: {_describe(texts)}. Give a list with the token ids of each. {_TOKENISE}")
    if isinstance(texts, Tensor | np.ndarray) and texts.ndim == 0:
        raise ConfigError(f"{name}s: a single number. Give a list with the token ids of each.")
    return [_check_text(config, f"{name} {i}", ids) for i, ids in enumerate(texts)]


def _check_text(config: ModelConfig, name: str, ids: Any) -> Tensor:
    if isinstance(ids, str | bytes):
        raise ConfigError(f"{name}: {_describe(ids)}, but a text is a list of token ids. {_TOKENISE}")
    if isinstance(ids, int | np.integer) or (isinstance(ids, Tensor | np.ndarray) and ids.ndim == 0):
        raise ConfigError(f"{name}: the number {ids}, but a text is a list of ids. One text alone is [ids].")
    try:
        tokens = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(
            f"{name}: {_describe(ids)} ({error}). Give a list of token ids, which are integers."
        ) from None
    wrong_type = tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool
    if tokens.layout != torch.strided or tokens.is_meta or tokens.is_nested:
        raise ConfigError(f"{name}: a {tokens.layout} tensor on {tokens.device} has no ids to read; give a dense one.")
    if tokens.dim() != 1 or wrong_type or not 1 <= len(tokens) <= config.max_text_length:
        raise ConfigError(
            f"{name}: {tokens.dtype} of shape {tuple(tokens.shape)}. Give a list of 1 to max_text_length="
            f"{config.max_text_length} token ids, BOS and EOS included."
        )
    tokens = tokens.to("cpu", torch.int64)  # torch has no min and max for uint16, the dtype of token files
    if tokens.min() < 0 or tokens.max() >= config.text_vocab_size:
        raise ConfigError(
            f"{name}: ids from {int(tokens.min())} to {int(tokens.max())}, but the vocabulary is "
            f"[0, {config.text_vocab_size}). Use the tokenizer that the model was trained with."
        )
    return tokens


def _describe(value: Any) -> str:
    """Returns the type and the abbreviated repr of a value, for error messages."""
    text = " ".join(repr(value).split())  # a tensor has many lines
    return f"{type(value).__name__} {text if len(text) <= _SHOWN_LETTERS else f'{text[:_SHOWN_LETTERS]}...'}"
