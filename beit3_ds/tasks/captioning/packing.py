"""Packs images with masked captions into one micro-batch."""

# M masked tokens.

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.data.packing import concatenate, pack_inputs, stack_views
from beit3_ds.tasks.captioning.head import TARGET_IDS
from beit3_ds.tasks.captioning.samples import CaptionSample

INDICES = "indices"
"""Key in `PackedBatch.targets`: index of each sample in its split, (samples,) int64."""
NUM_MASKED = "num_masked"
"""Key in `PackedBatch.targets`: number of masked tokens of each caption, (captions,) int64."""


def pack(
    samples: Sequence[CaptionSample],
    drop_path: Tensor | None,
    sources: Mapping[str, int],
    model: ModelConfig,
    embeds: bool = True,
) -> PackedBatch:
    """Packs images with captions; each token of a caption attends to the image, to itself and to the tokens before it.

    Args:
        samples: images with masked captions; may be empty.
        drop_path: factors of stochastic depth, (samples, layers, 2) float32; None without stochastic depth.
        sources: value of `PackedBatch.sources`.
        model: the model's configuration.
        embeds: whether the batch contains the pixels; a pipeline stage without the embedding layer needs none.
    """
    batch = pack_inputs(
        num_images=0,
        pixels=stack_views([sample.view for sample in samples], model.image_size) if embeds else None,
        num_patches=model.num_patches,
        captions=[sample.ids for sample in samples],
        drop_path=drop_path,
        sample_names=[sample.name for sample in samples],
        sources=sources,
    )
    first_caption_row = len(samples) * batch.image_length
    starts = first_caption_row + np.cumsum([0, *(len(sample.ids) for sample in samples)])
    rows = [start + sample.masked_positions for start, sample in zip(starts, samples, strict=False)]
    counts = [len(sample.masked_positions) for sample in samples]
    return dataclasses.replace(
        batch,
        causal_captions=True,
        head_rows=concatenate(rows),
        head_row_counts=(0, 0, sum(counts), 0),
        term_counts=(sum(counts),) * 2,
        targets={
            TARGET_IDS: concatenate([sample.target_ids for sample in samples]),
            INDICES: torch.tensor([sample.sample_index for sample in samples], dtype=torch.int64),
            NUM_MASKED: torch.tensor(counts, dtype=torch.int64),
        },
    )
