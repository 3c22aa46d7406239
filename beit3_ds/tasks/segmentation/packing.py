"""Packs training crops, sliding windows and whole images into micro-batches."""

# B images, E extractors, H height, W width.

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.data.packing import concatenate, pack_grids
from beit3_ds.tasks.segmentation.config import IGNORED
from beit3_ds.tasks.segmentation.mask_loss import TermCounts
from beit3_ds.tasks.segmentation.samples import LabelledCrop, WholeImage

LABELS = "labels"
"""Key in `PackedBatch.targets`: class of each pixel of the crops, (crops, size, size) uint8."""
CLASSES = "classes"
"""Key in `PackedBatch.targets`: classes in each crop, ascending, one crop after the other, int64."""
CLASS_COUNTS = "class counts"
"""Key in `PackedBatch.host_targets`: number of classes in each crop, (crops,) int64."""
SEEDS = "seeds"
"""Key in `PackedBatch.host_targets`: seed of the random points of each crop, (crops,) int64."""
DROP_PATH = "extractor factors"
"""Key in `PackedBatch.targets`: stochastic-depth factors of the adapter's extractors, (crops, extractors) float32."""
INDICES, SIZES, PIXELS, TRUTH = "indices", "sizes", "pixels", "truth"
"""Keys in `PackedBatch.targets` for whole images.

`INDICES` is the index of each image in its split, (images,) int64. `SIZES` is the height and width of each image in
pixels, (images, 2) int64. `PIXELS` is one flat uint8 vector with the pixels of all images. `TRUTH` is one flat uint8
vector with the class of each pixel.
"""


def pack(
    samples: Sequence[LabelledCrop | WholeImage],
    drop_path: Tensor | None,
    sources: Mapping[str, int],
    *,
    model: ModelConfig,
    num_queries: int,
) -> PackedBatch:
    """Packs crops for training, or whole images for an evaluation.

    A batch of whole images has no rows for the model. The evaluation cuts the images into windows and packs the windows
    with `pack_windows`.

    Args:
        samples: crops or whole images; may be empty.
        drop_path: factors of stochastic depth, (samples, layers, 2) float32; None without stochastic depth.
        sources: value of `PackedBatch.sources`.
        model: the model's configuration.
        num_queries: number of queries of the query decoder.
    """
    whole = [sample for sample in samples if isinstance(sample, WholeImage)]
    if whole:
        batch = pack_grids([], model.patch_size, sources=sources)
        return dataclasses.replace(batch, term_counts=(0, 0, 0), targets=_whole_targets(whole))
    crops = [sample for sample in samples if isinstance(sample, LabelledCrop)]
    shape = (len(crops), model.image_size, model.image_size)
    labels = np.stack([crop.labels for crop in crops]) if crops else np.empty(shape, dtype=np.uint8)
    targets, host_targets = label_targets(labels, [crop.seed for crop in crops])
    counts = [TermCounts.of(count, num_queries) for count in host_targets[CLASS_COUNTS].tolist()]
    batch = pack_grids(
        [crop.view for crop in crops],
        model.patch_size,
        drop_path=drop_path,
        sample_names=[crop.name for crop in crops],
        sources=sources,
    )
    masks = sum(of.masks for of in counts)
    if crops and len(crops[0].drop_path) and drop_path is not None:
        targets[DROP_PATH] = torch.from_numpy(np.stack([crop.drop_path for crop in crops]))
    if not crops:
        targets |= _whole_targets([])
    term_counts = (sum(of.classes for of in counts), masks, masks)
    return dataclasses.replace(batch, term_counts=term_counts, targets=targets, host_targets=host_targets)


def pack_windows(windows: Sequence[Tensor], patch_size: int) -> PackedBatch:
    """Packs windows of one size into a batch for an evaluation; there may be no windows.

    Args:
        windows: pixels of each window, (3, height, width) float32 in [-1, 1].
        patch_size: side of a patch in pixels.
    """
    return pack_grids(windows, patch_size)


def label_targets(labels_BHW: NDArray[np.uint8], seeds: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the targets and the host targets of the loss (`PackedBatch.targets` and `host_targets`).

    Args:
        labels_BHW: class of each pixel of the crops, `IGNORED` where unknown.
        seeds: seed of the random points of each crop.
    """
    classes = [np.flatnonzero(np.bincount(labels.ravel(), minlength=IGNORED)[:IGNORED]) for labels in labels_BHW]
    host_targets = {CLASS_COUNTS: list(map(len, classes)), SEEDS: list(seeds)}
    targets = {LABELS: torch.from_numpy(labels_BHW), CLASSES: concatenate(classes)}
    return targets, {name: torch.tensor(values, dtype=torch.int64) for name, values in host_targets.items()}


def _whole_targets(images: Sequence[WholeImage]) -> dict[str, Tensor]:
    sizes = [tuple(image.labels.shape) for image in images]
    nothing = torch.empty(0, dtype=torch.uint8)
    return {
        INDICES: torch.tensor([image.sample_index for image in images], dtype=torch.int64),
        SIZES: torch.tensor(sizes, dtype=torch.int64).view(-1, 2),
        PIXELS: torch.cat([nothing, *(image.pixels.flatten() for image in images)]),
        TRUTH: torch.cat([nothing, *(image.labels.flatten() for image in images)]),
    }


def unpack_whole(batch: PackedBatch) -> list[WholeImage]:
    """Returns the whole images of a batch that `pack` built; the names of the images are empty."""
    sizes = batch.targets[SIZES].tolist()
    lengths = [height * width for height, width in sizes]
    pixels = batch.targets[PIXELS].split([3 * length for length in lengths])
    labels = batch.targets[TRUTH].split(lengths)
    return [
        WholeImage("", sample_index, own.view(3, *size), truth.view(*size))
        for sample_index, size, own, truth in zip(batch.targets[INDICES].tolist(), sizes, pixels, labels, strict=True)
    ]
