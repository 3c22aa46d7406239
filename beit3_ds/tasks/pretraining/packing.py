"""Packs masked images, pairs and texts into one micro-batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import RunConfig
from beit3_ds.config.prefetch import ImageViews
from beit3_ds.data.images.augmentation import Views
from beit3_ds.data.packing import concatenate, pack_inputs, stack_colors, stack_views
from beit3_ds.tasks.pretraining.targets import with_masks


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSample:
    """Holds a cropped and masked image."""

    name: str
    """File of the sample and the sample's name in the file, for messages."""
    views: Views
    """Two views of one crop of the image: one for the model and one for the visual tokenizer."""
    patch_mask: NDArray[np.bool_]
    """True for masked patches, (patches,)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TextSample:
    """Holds a tokenized and masked text."""

    name: str
    """File of the sample and the sample's name in the file, for messages."""
    ids: NDArray[np.int64]
    """Token ids after masking, with BOS and EOS, (tokens,)."""
    masked_positions: NDArray[np.int64]
    """Positions of the tokens to predict, ascending, (masked tokens,)."""
    target_ids: NDArray[np.int64]
    """Original token ids at the masked positions, (masked tokens,)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PairSample:
    """Holds an image-text pair, both parts masked."""

    image: ImageSample
    caption: TextSample


Sample = ImageSample | PairSample | TextSample
"""A masked sample of pretraining: an image, an image-text pair or a text."""


class ImageShape(NamedTuple):
    """Holds the image sizes of a run, in pixels and patches. They determine the shapes of empty tensors in a batch
    without images.
    """

    image_size: int
    tokenizer_image_size: int
    num_patches: int


def image_shape(config: RunConfig) -> ImageShape:
    """Returns the sizes of a run's images, in pixels and patches."""
    return ImageShape(config.model.image_size, config.tokenizers.visual.image_size, config.model.num_patches)


def pack(
    samples: Sequence[Sample],
    drop_path: Tensor | None,
    sources: Mapping[str, int],
    shape: ImageShape,
    views: ImageViews = "both",
) -> PackedBatch:
    """Packs samples into one micro-batch; there may be no samples of a kind, or no samples at all.

    Args:
        samples: all images, then all pairs, then all texts.
        drop_path: factors of stochastic depth, (samples, layers, 2) float32, in the order of `samples`; None without
            stochastic depth.
        sources: value of `PackedBatch.sources`.
        shape: image sizes.
        views: views of each image to keep in the batch.
    """
    images = [sample for sample in samples if isinstance(sample, ImageSample)]
    pairs = [sample for sample in samples if isinstance(sample, PairSample)]
    texts = [sample for sample in samples if isinstance(sample, TextSample)]
    # drop_path is in the order of `samples`, so the batch must have the same order.
    assert [*images, *pairs, *texts] == list(samples), "samples must come as images, pairs, texts"
    pictures = [*images, *(pair.image for pair in pairs)]
    writings = [*(pair.caption for pair in pairs), *texts]
    starts = np.cumsum([0, *(len(text.ids) for text in writings)])
    masked = [start + text.masked_positions for start, text in zip(starts, writings, strict=False)]
    patch_mask = np.array([image.patch_mask for image in pictures], dtype=bool).reshape(-1, shape.num_patches)
    model_views, tokenizer_views = ([p.views.model for p in pictures], [p.views.tokenizer for p in pictures])
    inputs = pack_inputs(
        num_images=len(images),
        pixels=None if views == "tokenizer" else stack_views(model_views, shape.image_size),
        colors=stack_colors([picture.views.colors for picture in pictures]),
        num_patches=shape.num_patches,
        captions=[pair.caption.ids for pair in pairs],
        texts=[text.ids for text in texts],
        patch_mask=torch.from_numpy(patch_mask),
        drop_path=drop_path,
        sample_names=[image.name for image in pictures] + [text.name for text in texts],
        sources=sources,
    )
    return with_masks(
        inputs,
        masked_tokens=concatenate(masked),
        target_ids=concatenate([text.target_ids for text in writings]),
        tokenizer_pixels=None if views == "model" else stack_views(tokenizer_views, shape.tokenizer_image_size),
    )
