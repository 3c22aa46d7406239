"""Builds small models and random packed batches for the tests."""

import numpy as np
import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.tasks.pretraining.targets import TOKENIZER_PIXELS, with_masks


def small_model_config(**changes: object) -> ModelConfig:
    """Returns a model of three blocks for 4 x 4 patches; the top block has a vision-language expert."""
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
    """Returns the layout of the released models, at the size of `small_model_config`."""
    return small_model_config(layout="decoupled", sub_layernorm=True, num_vision_language_layers=0, **changes)


def random_batch(
    config: ModelConfig, num_images: int, num_pairs: int, num_texts: int, seed: int = 0, drop_path: bool = False
) -> PackedBatch:
    """Returns a batch of random pixels, ids, masks and visual targets; texts have 3 to `max_text_length` tokens."""
    rng = np.random.default_rng([seed, num_images, num_pairs, num_texts])
    lengths = rng.integers(3, config.max_text_length + 1, num_pairs + num_texts)
    num_tokens, num_pixels = int(lengths.sum()), num_images + num_pairs
    masked = np.flatnonzero(rng.random(num_tokens) < 0.3)
    patch_mask = torch.from_numpy(rng.random((num_pixels, config.num_patches)) < 0.4)
    pixels = torch.from_numpy(rng.standard_normal((num_pixels, 3, config.image_size, config.image_size))).float()
    kept = rng.random((num_images + num_pairs + num_texts, config.num_layers, 2)) < 0.7
    token_ids = rng.integers(0, config.text_vocab_size, num_tokens)
    target_ids = rng.integers(0, config.text_vocab_size, len(masked))
    inputs = PackedBatch(
        num_images=num_images,
        num_pairs=num_pairs,
        caption_lengths=tuple(lengths[:num_pairs].tolist()),
        text_lengths=tuple(lengths[num_pairs:].tolist()),
        pixels=pixels,
        patch_mask=patch_mask,
        token_ids=torch.from_numpy(token_ids),
        drop_path=torch.from_numpy(kept / 0.7).float() if drop_path else None,
    )
    return with_masks(
        inputs,
        masked_tokens=torch.from_numpy(masked),
        target_ids=torch.from_numpy(target_ids),
        tokenizer_pixels=pixels,
        visual_codes=torch.from_numpy(rng.integers(0, config.visual_vocab_size, int(patch_mask.sum()))),
    )


def merge_batches(batches: list[PackedBatch]) -> PackedBatch:
    """Joins the samples of several micro-batches in one micro-batch."""
    images = [slice(0, b.num_images) for b in batches]
    pairs = [slice(b.num_images, None) for b in batches]
    captions = [slice(0, sum(b.caption_lengths)) for b in batches]
    texts = [slice(sum(b.caption_lengths), None) for b in batches]

    def join(values: list[torch.Tensor], first: list[slice], second: list[slice]) -> torch.Tensor:
        parts = [v[s] for half in (first, second) for v, s in zip(values, half, strict=True)]
        return torch.cat(parts)

    codes = [
        torch.full(b.patch_mask.shape, -1).masked_scatter(b.patch_mask, b.targets["visual_codes"]) for b in batches
    ]
    targets = [
        torch.full(b.token_ids.shape, -1).index_copy(0, b.targets["masked_tokens"], b.targets["target_ids"])
        for b in batches
    ]
    all_targets = join(targets, captions, texts)
    patch_mask = join([b.patch_mask for b in batches], images, pairs)
    drop_path = None
    if batches[0].drop_path is not None:
        ends = [(b.num_images, b.num_images + b.num_pairs) for b in batches]
        kinds = [[slice(0, i) for i, _ in ends], [slice(i, p) for i, p in ends], [slice(p, None) for _, p in ends]]
        drop_path = torch.cat([b.drop_path[s] for kind in kinds for b, s in zip(batches, kind, strict=True)])
    inputs = PackedBatch(
        num_images=sum(b.num_images for b in batches),
        num_pairs=sum(b.num_pairs for b in batches),
        caption_lengths=tuple(length for b in batches for length in b.caption_lengths),
        text_lengths=tuple(length for b in batches for length in b.text_lengths),
        pixels=join([b.pixels for b in batches], images, pairs),
        patch_mask=patch_mask,
        token_ids=join([b.token_ids for b in batches], captions, texts),
        drop_path=drop_path,
        causal_captions=batches[0].causal_captions,
    )
    return with_masks(
        inputs,
        masked_tokens=(all_targets >= 0).nonzero().squeeze(1),
        target_ids=all_targets[all_targets >= 0],
        tokenizer_pixels=join([b.targets[TOKENIZER_PIXELS] for b in batches], images, pairs),
        visual_codes=join(codes, images, pairs)[patch_mask],
    )
