"""Packs the inputs of samples into one micro-batch, for all tasks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.patch_grids import canvas_grid

Pack = Callable[[Sequence[Any], Tensor | None, Mapping[str, int]], PackedBatch]
"""Function that builds a micro-batch from prepared samples and the values of `PackedBatch.drop_path` and
`PackedBatch.sources`.

The samples are sorted by stream: images, pairs, texts. `drop_path` has `Stream.sequences_per_sample` rows for each
sample, in this order. A task that packs sequences in another order must reorder these rows.
"""


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
    """Packs images, image-text pairs and texts into one micro-batch; any of the three may be absent.

    Args:
        num_images: number of images without captions.
        pixels: all images, (images, 3, image_size, image_size) from `stack_views`; images without captions come first.
            None if this pipeline stage needs no pixels.
        colors: value of `PackedBatch.colors` (`stack_colors`).
        num_patches: number of patches per image.
        captions: token ids of each pair's caption, including BOS and EOS.
        texts: token ids of each text, including BOS and EOS.
        patch_mask: True for patches that the mask token replaces, (images, patches) bool; None masks no patches.
        drop_path: value of `PackedBatch.drop_path`, with rows in the order images, pairs, texts.
        sample_names: value of `PackedBatch.sample_names`, in the order images, pairs, texts.
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
    """Packs images of any size into one micro-batch, for a model with `model.dense`; there may be no images.

    Each image is padded with zeros on the right and at the bottom to whole patches. All images are stored in one
    tensor, large enough for the largest image. Only patches of an image's own grid become rows of the micro-batch.

    Args:
        images: pixels of each image, (3, height, width) float32 in [-1, 1].
        patch_size: side of a patch in pixels.
        keeps_pixels: whether the batch contains pixels; a pipeline stage without embeddings needs none.
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
    """Stacks images into one tensor, (images, 3, size, size), with the dtype of `views`; there may be no images."""
    return torch.stack(list(views)) if views else torch.empty(0, 3, size, size)


def stack_colors(colors: Sequence[Tensor | None]) -> Tensor | None:
    """Stacks the parameters of the images' colour changes to (images, 3, 3); returns None without colour changes.

    Either all images have colour changes, or none has.

    Args:
        colors: colour changes of each image; None for an image without changes. The three changes of an image are (3,
            3), with one row (factor, weight, offset) per change (`pixels.change_colors`).
    """
    found = [change for change in colors if change is not None]
    assert len(found) in (0, len(colors)), "either all images of a batch have changes of colours, or none has"
    return torch.stack(found) if found else None


def concatenate(parts: Sequence[NDArray[np.int64]]) -> Tensor:
    """Concatenates integer arrays into one tensor, (n,) int64, which may be empty."""
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *parts]))
