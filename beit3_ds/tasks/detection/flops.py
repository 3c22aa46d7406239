"""Counts the floating-point operations of the detection head, for pipeline partitioning and utilisation."""

from beit3_ds.config import ModelConfig
from beit3_ds.tasks.detection.config import DetectionConfig

_BOX_SIDE, _MASK_SIDE, _CONVS, _STAGES = 7, 14, 4, 3
_CELLS_PER_PATCH = {4: 16.0, 8: 4.0, 16: 1.0, 32: 1 / 4, 64: 1 / 16}
_POSITIVE_SHARE = 0.25


def image_flops(model: ModelConfig, settings: DetectionConfig) -> float:
    """Returns the floating-point operations of the head's forward pass for one image; a multiply-add counts as 2.

    Counts matrix products and convolutions. Assumes an image with `model.image_size` pixels per side, and
    `sampled_boxes` proposals, a quarter of them positive.
    """
    width, channels = model.hidden_size, settings.pyramid_channels
    conv = 9 * channels**2
    # Transposed convolutions: to twice and four times the resolution for stride 4, to twice for stride 8.
    per_patch = 4 * width * width / 2 + 16 * (width / 2) * (width / 4) + 4 * width * width / 2
    entering = {4: width / 4, 8: width / 2, 16: width, 32: width}
    per_patch += sum(_CELLS_PER_PATCH[stride] * (wide * channels + conv) for stride, wide in entering.items())
    per_patch += sum(cells * (2 * conv + 15 * channels) for cells in _CELLS_PER_PATCH.values())  # proposals
    pooled = channels * _BOX_SIDE**2
    outputs = settings.box_width * (settings.num_classes + 5)
    per_box = _STAGES * (_CONVS * _BOX_SIDE**2 * conv + pooled * settings.box_width + outputs)
    per_mask = _MASK_SIDE**2 * (_CONVS * conv + 4 * channels**2 + 4 * channels * settings.num_classes)
    masks = _POSITIVE_SHARE * per_mask if settings.masks else 0.0
    return 2 * (model.num_patches * per_patch + settings.sampled_boxes * (per_box + masks))
