"""Packs images into a micro-batch for training the visual tokenizer."""

# B images, N patches per image, E width of the teacher's features.

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import VisualTokenizerConfig
from beit3_ds.data.packing import pack_inputs, stack_colors, stack_views
from beit3_ds.tasks.visual_tokenizer.samples import TokenizerView

TEACHER_FEATURES = "teacher_features"
"""Key in `PackedBatch.targets`: features of the teacher, (images, patches, features) float32, on the model's device."""


def pack(
    samples: Sequence[TokenizerView],
    drop_path: Tensor | None,
    sources: Mapping[str, int],
    visual: VisualTokenizerConfig,
) -> PackedBatch:
    """Packs images into a micro-batch. Sets both term counts to the number of patches.

    Each of the two loss terms is a mean over patches, so its sum is divided by its term count.

    Args:
        samples: augmented images, (3, image_size, image_size) each; may be empty.
        drop_path: must be None, because the tokenizer has no stochastic depth.
        sources: value of `PackedBatch.sources`.
        visual: configuration of the tokenizer.
    """
    num_patches = visual.grid_size**2
    batch = pack_inputs(
        num_images=len(samples),
        pixels=stack_views([sample.pixels for sample in samples], visual.image_size),
        colors=stack_colors([sample.colors for sample in samples]),
        num_patches=num_patches,
        drop_path=drop_path,
        sample_names=[sample.name for sample in samples],
        sources=sources,
    )
    return replace(batch, term_counts=(len(samples) * num_patches,) * 2)


def with_teacher_features(batch: PackedBatch, features_BNE: Tensor) -> PackedBatch:
    """Returns the batch with an additional target: the teacher's features, (images, patches, features)."""
    return batch.with_targets({**batch.targets, TEACHER_FEATURES: features_BNE})
