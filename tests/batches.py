"""Small models and random packed batches for the tests."""

import numpy as np
import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig


def small_model_config(**changes: object) -> ModelConfig:
    """Three blocks, the top one with a vision-language expert, on 4 x 4 patches."""
    values: dict = {
        "num_layers": 3,
        "hidden_size": 24,
        "ffn_hidden_size": 40,
        "num_attention_heads": 3,
        "patch_size": 4,
        "image_size": 16,
        "num_vision_language_layers": 1,
        "text_vocab_size": 50,
        "visual_vocab_size": 30,
        "max_text_length": 20,
        "cross_entropy_chunk_size": 4,
    }
    return ModelConfig(**(values | changes))


def decoupled(**changes: object) -> ModelConfig:
    """The released models' layout at the same size."""
    return small_model_config(layout="decoupled", sub_layernorm=True, num_vision_language_layers=0, **changes)


def random_batch(
    config: ModelConfig, num_images: int, num_pairs: int, num_texts: int, seed: int = 0, drop_path: bool = False
) -> PackedBatch:
    """A batch of random pixels, ids and masks, with visual targets; lengths vary from 3 to `max_text_length`."""
    rng = np.random.default_rng([seed, num_images, num_pairs, num_texts])
    lengths = rng.integers(3, config.max_text_length + 1, num_pairs + num_texts)
    num_tokens, num_pixels = int(lengths.sum()), num_images + num_pairs
    masked = np.flatnonzero(rng.random(num_tokens) < 0.3)
    patch_mask = torch.from_numpy(rng.random((num_pixels, config.num_patches)) < 0.4)
    pixels = torch.from_numpy(rng.standard_normal((num_pixels, 3, config.image_size, config.image_size))).float()
    kept = rng.random((num_images + num_pairs + num_texts, config.num_layers, 2)) < 0.7
    return PackedBatch(
        num_images=num_images,
        num_pairs=num_pairs,
        caption_lengths=tuple(lengths[:num_pairs].tolist()),
        text_lengths=tuple(lengths[num_pairs:].tolist()),
        pixels=pixels,
        tokenizer_pixels=pixels,
        patch_mask=patch_mask,
        token_ids=torch.from_numpy(rng.integers(0, config.text_vocab_size, num_tokens)),
        masked_tokens=torch.from_numpy(masked),
        target_ids=torch.from_numpy(rng.integers(0, config.text_vocab_size, len(masked))),
        drop_path=torch.from_numpy(kept / 0.7).float() if drop_path else None,
        visual_targets=torch.from_numpy(rng.integers(0, config.visual_vocab_size, int(patch_mask.sum()))),
    )
