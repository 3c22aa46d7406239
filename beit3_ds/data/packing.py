"""Packs the inputs of samples into one micro-batch; used by all tasks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.patch_grids import canvas_grid

Pack = Callable[[Sequence[Any], Tensor | None, Mapping[str, int]], PackedBatch]
"""Builds a micro-batch from a task's prepared samples and the values of `PackedBatch.drop_path` and
`PackedBatch.sources`. Samples are in the order of the streams, with `Stream.sequences_per_sample` rows of `drop_path`
each. A task that packs sequences in another order reorders the rows."""


def pack_inputs(
    *,
    num_images: int,
    pixels: Tensor | None,
    colors: Tensor | None = None,
    num_patches: int,
    captions: Sequence[NDArray[np.int64]] = (),
    texts: Sequence[NDArray[np.int64]] = (),
    patch_mask: Tensor | None = None,
    drop_path: Tensor | None = None,
    sample_names: Sequence[str] = (),
    sources: Mapping[str, int] | None = None,
) -> PackedBatch:
    """Packs images, pairs and texts into one micro-batch; each of the three, or all, may be absent.

    Args:
        num_images: number of images without captions.
        pixels: all images, (images, 3, image_size, image_size), first those without captions (`stack_views`); None if
            this pipeline stage needs no pixels.
        colors: value of `PackedBatch.colors` (`stack_colors`).
        num_patches: number of patches per image.
        captions: token ids of the caption of each pair, BOS and EOS included.
        texts: token ids of each text, BOS and EOS included.
        patch_mask: True for patches that the mask token replaces, (images, patches) bool; None masks no patches.
        drop_path: value of `PackedBatch.drop_path`, with rows in the order images, pairs, texts.
        sample_names: value of `PackedBatch.sample_names`, in the same order.
        sources: value of `PackedBatch.sources`.
    """
    if patch_mask is None:
        patch_mask = torch.zeros(num_images + len(captions), num_patches, dtype=torch.bool)
    return PackedBatch(
        num_images=num_images,
        num_pairs=len(captions),
        caption_lengths=tuple(map(len, captions)),
        text_lengths=tuple(map(len, texts)),
        pixels=pixels,
        colors=colors,
        patch_mask=patch_mask,
        token_ids=concatenate([*captions, *texts]),
        drop_path=drop_path,
        sample_names=tuple(sample_names),
        sources=dict(sources or {}),
    )


def pack_grids(
    images: Sequence[Tensor],
    patch_size: int,
    *,
    keeps_pixels: bool = True,
    drop_path: Tensor | None = None,
    sample_names: Sequence[str] = (),
    sources: Mapping[str, int] | None = None,
) -> PackedBatch:
    """Packs images of any size, for a model with `model.dense`; there may be none.

    Each image is padded with zeros at the right and at the bottom to a multiple of the patch size, which gives its grid
    of patches. The tensor of pixels is as large as the largest grid, but only patches in an image's own grid become
    rows.

    Args:
        images: pixels of each image, (3, height, width) float32 in [-1, 1].
        patch_size: pixels on a side of a patch.
        keeps_pixels: False leaves out the pixels, which a pipeline stage without embeddings does not need.
        drop_path: value of `PackedBatch.drop_path`, one row per image.
        sample_names: value of `PackedBatch.sample_names`.
        sources: value of `PackedBatch.sources`.
    """
    grids = tuple((-(-image.shape[1] // patch_size), -(-image.shape[2] // patch_size)) for image in images)
    height, width = canvas_grid(grids)
    pixels = torch.zeros(len(images), 3, height * patch_size, width * patch_size) if keeps_pixels else None
    for number, image in enumerate(images if pixels is not None else ()):
        pixels[number, :, : image.shape[1], : image.shape[2]] = image  # type: ignore[index]
    return PackedBatch(
        num_images=len(images),
        num_pairs=0,
        caption_lengths=(),
        text_lengths=(),
        pixels=pixels,
        image_grids=grids,
        patch_mask=torch.zeros(len(images), 0, dtype=torch.bool),
        token_ids=torch.empty(0, dtype=torch.int64),
        drop_path=drop_path,
        sample_names=tuple(sample_names),
        sources=dict(sources or {}),
    )


def stack_views(views: Sequence[Tensor], size: int) -> Tensor:
    """Stacks images into one tensor, (images, 3, size, size) of their dtype; `views` may be empty."""
    return torch.stack(list(views)) if views else torch.empty(0, 3, size, size)


def stack_colors(colors: Sequence[Tensor | None]) -> Tensor | None:
    """Stacks changes of colours, (3, 3) per image, into one tensor; returns None if no image has any."""
    found = [change for change in colors if change is not None]
    assert len(found) in (0, len(colors)), "either all images of a batch have changes of colours, or none has"
    return torch.stack(found) if found else None


def concatenate(parts: Sequence[NDArray[np.int64]]) -> Tensor:
    """Concatenates arrays of integers into one tensor, (n,) int64; n is 0 if there are no integers."""
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *parts]))
