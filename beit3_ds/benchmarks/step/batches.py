"""Builds the batches and the run config for `beit3 bench train`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.config import RunConfig, build_run_config
from beit3_ds.data.drop_path import Slot, draw_drop_path
from beit3_ds.data.images.augmentation import Views
from beit3_ds.tasks.pretraining.config import pretraining_config
from beit3_ds.tasks.pretraining.masking import block_mask
from beit3_ds.tasks.pretraining.packing import ImageSample, PairSample, Sample, TextSample, image_shape, pack
from beit3_ds.tasks.pretraining.targets import with_visual_codes

STREAMS = ("images", "pairs", "texts")
CAPTION_TOKENS = (16, 0.45)
"""Log-normal distribution of the number of tokens per caption, with BOS and EOS: median, and standard deviation of the
logarithm. Captions of COCO have about 11 words, and captions of Conceptual Captions have 10 to 20 words. Few captions
are long."""
TEXT_TOKENS = (105, 0.6)
"""Log-normal distribution of the tokens per text: median, and standard deviation of the logarithm. A text consists of
complete paragraphs with at most 128 tokens in total. About a third of the texts reach this limit."""
_MIN_TOKENS = 6


def step_config(size: str, samples: int = 4, **model: Any) -> RunConfig:
    """Returns a run config for one rank in float32.

    The parameter layout follows the released models, and the mask ratios follow the paper.

    Args:
        size: model size.
        samples: number of images per step. A step has as many pairs, and as many texts.
        model: further keys for the section "model".
    """
    stream = {"train": ["none.tar"], "samples_per_step": samples}
    sizes = {"size": size, "layout": "decoupled", "num_vision_language_layers": 0, "sub_layernorm": True}
    return build_run_config(
        {
            "gradient_clipping": 3.0,
            "zero_optimization": {"stage": 0},
            "steps_per_print": 1_000_000_000,
            "beit3_ds": {
                "model": {**sizes, "drop_path_rate": 0.1, **model},
                "data": dict.fromkeys(STREAMS, stream),
                "tokenizers": {
                    "text": {"path": "none.spm", "vocab_size": 64000},
                    "visual": {"path": "none.safetensors", "image_size": 224, "patch_size": 16},
                },
                "training": {"output_dir": "none", "total_steps": 100, "warmup_steps": 1, "learning_rate": 1e-4},
            },
        }
    )


def build_batch(config: RunConfig, number: int) -> PackedBatch:
    """Builds a batch with random pixels, token ids and visual codes.

    `number` is the seed, so all processes build equal values.
    """
    rng, count = np.random.default_rng([17, number]), config.samples_per_step // len(STREAMS)
    samples: list[Sample] = [_image(config, rng) for _ in range(count)]
    for _ in range(count):
        image = _image(config, rng)
        caption = _text(
            config, rng, CAPTION_TOKENS, config.data.pair_text_length, pretraining_config(config).pair_text_mask_ratio
        )
        samples.append(PairSample(image=image, caption=caption))
    for _ in range(count):
        samples.append(
            _text(config, rng, TEXT_TOKENS, config.data.text_length, pretraining_config(config).text_mask_ratio)
        )
    slots = [Slot(stream, i) for stream in STREAMS for i in range(count)]
    drop_path = draw_drop_path(config.model.drop_path_rate, config.model.num_layers, 0, number, slots)
    batch = pack(samples, drop_path, {}, image_shape(config), "model")
    codes = rng.integers(0, config.model.visual_vocab_size, tuple(batch.patch_mask.shape))
    return with_visual_codes(batch, torch.from_numpy(codes))


def describe_batch(batch: PackedBatch) -> Mapping[str, Any]:
    """Returns the sizes of a batch that determine time and memory, by name."""
    return {
        "caption_tokens": batch.caption_lengths,
        "text_tokens": batch.text_lengths,
        "rows": batch.num_rows,
        "masked": batch.term_counts,
    }


def draw_length(rng: np.random.Generator, law: tuple[float, float], longest: int) -> int:
    """Draws a number of tokens from a log-normal distribution, limited to the range from 6 to `longest`.

    Args:
        rng: random number generator.
        law: median, and standard deviation of the logarithm.
        longest: maximum number of tokens.
    """
    median, spread = law
    return int(np.clip(round(median * float(np.exp(spread * rng.standard_normal()))), _MIN_TOKENS, longest))


def _image(config: RunConfig, rng: np.random.Generator) -> ImageSample:
    size, grid, num_patches = config.model.image_size, config.model.grid_size, config.model.num_patches
    view = torch.from_numpy(rng.uniform(-1, 1, (3, size, size)).astype(np.float32))
    mask = block_mask(grid, round(num_patches * pretraining_config(config).image_mask_ratio), rng)
    return ImageSample(name="", views=Views(view, view), patch_mask=mask)


def _text(
    config: RunConfig, rng: np.random.Generator, law: tuple[float, float], longest: int, ratio: float
) -> TextSample:
    length = draw_length(rng, law, longest)
    ids = rng.integers(3, config.model.text_vocab_size - 9, length)
    num_masked = max(1, min(round(length * ratio), length - 1))
    positions = np.sort(rng.choice(np.arange(1, length), num_masked, replace=False))  # BOS is never masked
    return TextSample(name="", ids=ids, masked_positions=positions, target_ids=ids[positions])
