"""Packs images and captions as separate sequences: all images, then all captions."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.data.packing import pack_inputs, stack_views
from beit3_ds.tasks.retrieval.contrastive import IMAGE_IDS, TEXT_IDS
from beit3_ds.tasks.retrieval.samples import RetrievalSample

IMAGE_INDICES = "image_index"
"""Key in `PackedBatch.targets` and `StepFeatures.rows`: index of each image in its split, (images,) int64."""
CAPTION_KEYS = "caption_key"
"""Name of an entry in `PackedBatch.targets` and `StepFeatures.rows`: the key of each caption, (captions,) int64. The
key is the index of the caption's image in the split, times `MAX_CAPTIONS`, plus the caption's index among the image's
captions."""
MAX_CAPTIONS = 1 << 20
"""Maximum number of captions per image."""
NUM_TERMS = 4
"""Number of loss terms of the task; each term is a mean over image-text pairs."""

_IMAGES, _TEXTS = 0, 3  # indices into `layout.PARTS`


def pack(
    samples: Sequence[RetrievalSample],
    drop_path: Tensor | None,
    sources: Mapping[str, int],
    model: ModelConfig,
    embeds: bool,
) -> PackedBatch:
    """Packs the images of all samples, then the captions of all samples.

    Args:
        samples: images with captions; may be empty. A training sample has one caption.
        drop_path: factors of stochastic depth, (2 * samples, layers, 2) float32; None without stochastic depth. Its
            rows are in another order than the packed rows: first sample's image, first sample's caption, second
            sample's image, and so on.
        sources: value of `PackedBatch.sources`.
        model: the model's configuration.
        embeds: whether the batch contains the pixels; a pipeline stage without the embedding layer needs none.
    """
    batch = pack_inputs(
        num_images=len(samples),
        pixels=stack_views([sample.view for sample in samples], model.image_size) if embeds else None,
        num_patches=model.num_patches,
        texts=[text for sample in samples for text in sample.texts],
        drop_path=None if drop_path is None else torch.cat([drop_path[0::2], drop_path[1::2]]),
        sample_names=[s.name for s in samples] + [s.name for s in samples for _ in s.texts],
        sources=sources,
    )
    keys = [sample.sample_index * MAX_CAPTIONS + place for sample in samples for place in range(len(sample.texts))]
    targets = {
        IMAGE_IDS: [sample.image_id for sample in samples],
        TEXT_IDS: [text_id for sample in samples for text_id in sample.text_ids],
        IMAGE_INDICES: [sample.sample_index for sample in samples],
        CAPTION_KEYS: keys,
    }
    picked = batch.layout.first_rows(_IMAGES, _TEXTS)
    return dataclasses.replace(
        batch,
        head_rows=picked.rows,
        head_row_counts=picked.counts,
        term_counts=(len(samples),) * NUM_TERMS,
        targets={name: torch.tensor(values, dtype=torch.int64) for name, values in targets.items()},
    )
