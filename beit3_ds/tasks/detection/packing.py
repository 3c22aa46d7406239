"""Packs training images and their objects, or evaluation views of images, into a micro-batch."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.data.packing import pack_grids
from beit3_ds.tasks.detection.objects import SEEDS, SIZES, empty_objects, pack_objects
from beit3_ds.tasks.detection.samples import DetectionSample
from beit3_ds.tasks.detection.views import FLIPS, INDICES, ORIGINAL_SIZES, SAMPLES


def pack(
    samples: Sequence[DetectionSample],
    drop_path: Tensor | None,
    sources: Mapping[str, int],
    *,
    model: ModelConfig,
    num_terms: int,
    embeds: bool,
) -> PackedBatch:
    """Packs the views of all samples into a micro-batch, in the order of the samples; there may be no samples.

    Every pipeline stage that reads samples keeps the targets. The stages compare integer targets to check that they
    have read equal samples.

    Args:
        samples: prepared samples of training or of an evaluation.
        drop_path: value of `PackedBatch.drop_path`.
        sources: value of `PackedBatch.sources`.
        model: the model's configuration.
        num_terms: number of loss terms of the task; each is a sum over images.
        embeds: whether the batch contains the pixels; a pipeline stage without the embedding layer needs none.
    """
    pixels = [view for sample in samples for view in sample.pixels]
    batch = pack_grids(
        pixels,
        model.patch_size,
        keeps_pixels=embeds,
        drop_path=drop_path,
        sample_names=[sample.name for sample in samples for _ in sample.pixels],
        sources=sources,
    )
    targets, host_targets = pack_objects([sample.objects or empty_objects() for sample in samples])
    targets[SEEDS] = _integers([sample.seed for sample in samples])
    host_targets |= _view_targets(samples) | {SIZES: _integers([view.shape[1:] for view in pixels], 2)}
    counts = (len(samples),) * num_terms
    return dataclasses.replace(batch, term_counts=counts, targets=targets, host_targets=host_targets)


def _view_targets(samples: Sequence[DetectionSample]) -> dict[str, Tensor]:
    views = [view._replace(sample=place) for place, sample in enumerate(samples) for view in sample.views]
    return {
        INDICES: _integers([sample.sample_index for sample in samples]),
        SAMPLES: _integers([view.sample for view in views]),
        ORIGINAL_SIZES: _integers([view.original for view in views], 2),
        FLIPS: torch.tensor([view.is_flipped for view in views], dtype=torch.bool),
    }


def _integers(values: Sequence[object], width: int = 0) -> Tensor:
    shape = (len(values), width) if width else (len(values),)
    return torch.tensor(values, dtype=torch.int64).reshape(shape)
