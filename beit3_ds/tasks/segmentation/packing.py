"""Packs crops, windows and whole images into micro-batches."""

# B images, E extractors.

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.data.packing import pack_grids
from beit3_ds.tasks.segmentation.config import IGNORED
from beit3_ds.tasks.segmentation.mask_loss import TermCounts
from beit3_ds.tasks.segmentation.samples import LabelledCrop, WholeImage

LABELS = "labels"
"""Key in `PackedBatch.targets` of the class of each pixel of the crops, (B, size, size) uint8."""
SEEDS = "seeds"
"""Key in `PackedBatch.targets` of the seed of each crop's sampled points, (B,) int64."""
DROP_PATH = "extractor factors"
"""Key in `PackedBatch.targets` of the stochastic-depth factors of the adapter's extractors, (B, E) float32."""
NUMBERS, SIZES, PIXELS, TRUTH = "numbers", "sizes", "pixels", "truth"
"""Keys in `PackedBatch.targets` for whole images.

They are the index in the stream, (B,) int64; height and width, (B, 2) int64; the pixels of all images in one vector,
uint8; and the classes of all images in one vector, uint8."""


def pack(
    samples: Sequence[LabelledCrop | WholeImage],
    drop_path: Tensor | None,
    sources: Mapping[str, int],
    *,
    model: ModelConfig,
    num_queries: int,
) -> PackedBatch:
    """Packs crops for training, or whole images for an evaluation.

    A batch of whole images has no rows: the evaluation cuts the images into windows and packs these (`pack_windows`).

    Args:
        samples: crops or whole images; may be empty.
        drop_path: factors of stochastic depth, (B, layers, 2) float32, or None.
        sources: value of `PackedBatch.sources`.
        model: sizes of the model.
        num_queries: number of the decoder's queries.
    """
    whole = [sample for sample in samples if isinstance(sample, WholeImage)]
    if whole:
        batch = pack_grids([], model.patch_size, sources=sources)
        return dataclasses.replace(batch, term_counts=(0, 0, 0), targets=_whole_targets(whole))
    crops = [sample for sample in samples if isinstance(sample, LabelledCrop)]
    counts = [_term_counts(crop, num_queries) for crop in crops]
    batch = pack_grids(
        [crop.view for crop in crops],
        model.patch_size,
        drop_path=drop_path,
        sample_names=[crop.name for crop in crops],
        sources=sources,
    )
    masks = sum(of.masks for of in counts)
    shape = (len(crops), model.image_size, model.image_size)
    labels = np.stack([crop.labels for crop in crops]) if crops else np.empty(shape, dtype=np.uint8)
    targets = {LABELS: torch.from_numpy(labels), SEEDS: torch.tensor([crop.seed for crop in crops], dtype=torch.int64)}
    if crops and len(crops[0].drop_path) and drop_path is not None:
        targets[DROP_PATH] = torch.from_numpy(np.stack([crop.drop_path for crop in crops]))
    if not crops:
        targets |= _whole_targets([])
    return dataclasses.replace(batch, term_counts=(sum(of.classes for of in counts), masks, masks), targets=targets)


def pack_windows(windows: Sequence[Tensor], patch_size: int) -> PackedBatch:
    """Packs windows of an evaluation, (3, height, width) float32 in [-1, 1], all of one size; there may be none."""
    return pack_grids(windows, patch_size)


def _term_counts(crop: LabelledCrop, num_queries: int) -> TermCounts:
    classes = np.bincount(crop.labels.ravel(), minlength=IGNORED + 1)[:IGNORED]
    return TermCounts.of(int(np.count_nonzero(classes)), num_queries)


def _whole_targets(images: Sequence[WholeImage]) -> dict[str, Tensor]:
    sizes = [tuple(image.labels.shape) for image in images]
    nothing = torch.empty(0, dtype=torch.uint8)
    return {
        NUMBERS: torch.tensor([image.number for image in images], dtype=torch.int64),
        SIZES: torch.tensor(sizes, dtype=torch.int64).view(-1, 2),
        PIXELS: torch.cat([nothing, *(image.pixels.flatten() for image in images)]),
        TRUTH: torch.cat([nothing, *(image.labels.flatten() for image in images)]),
    }


def unpack_whole(batch: PackedBatch) -> list[WholeImage]:
    """Returns the whole images of a batch for an evaluation; their names are empty."""
    sizes = batch.targets[SIZES].tolist()
    lengths = [height * width for height, width in sizes]
    pixels = batch.targets[PIXELS].split([3 * length for length in lengths])
    labels = batch.targets[TRUTH].split(lengths)
    return [
        WholeImage("", number, own.view(3, *size), truth.view(*size))
        for number, size, own, truth in zip(batch.targets[NUMBERS].tolist(), sizes, pixels, labels, strict=True)
    ]
