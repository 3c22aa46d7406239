"""Estimates the activation memory of the detection head, for `beit3 check`."""

from beit3_ds.config import ModelConfig
from beit3_ds.model.dense.pyramid_memory import pyramid_memory
from beit3_ds.tasks.detection.config import DetectionConfig

_BOX_SIDE, _MASK_SIDE, _CONVS, _STAGES = 7, 14, 4, 3
_CELLS_PER_PATCH = (16, 4, 1, 1 / 4, 1 / 16)
_POSITIVE_SHARE = 0.25
_FLOAT, _INDEX = 4, 8  # bytes


def image_memory(model: ModelConfig, settings: DetectionConfig, element_size: int) -> int:
    """Returns the bytes of head activations that autograd keeps per image.

    Assumes an image with `model.image_size` pixels per side, and `sampled_boxes` proposals, a quarter of them positive.
    Counts the inputs of convolutions, linear layers, activation functions and norms, and the statistics of norms. Does
    not count the outputs of the proposal network, which are small. Does not count temporary memory, such as RoIAlign's
    float32 copies of the maps.

    Args:
        model: the model's configuration.
        settings: the task's settings.
        element_size: bytes per element of an activation.
    """
    total = _pyramid(model, settings, element_size) + settings.sampled_boxes * _box(settings, element_size)
    if settings.masks:
        total += int(settings.sampled_boxes * _POSITIVE_SHARE) * _mask(settings, element_size)
    return total


def _pyramid(model: ModelConfig, settings: DetectionConfig, element_size: int) -> int:
    """Returns the bytes kept per image for the pyramid and the proposal network."""
    channels = settings.pyramid_channels
    per_patch = pyramid_memory(model.hidden_size, channels, element_size) + channels / 16 * _INDEX
    # The proposal network's two layers on each map, and the coarsest map, which is a max pooling.
    per_patch += channels * (2 * sum(_CELLS_PER_PATCH) + 1 / 16) * element_size
    if model.final_norm:
        per_patch += model.hidden_size * element_size
    return int(model.num_patches * per_patch)


def _box(settings: DetectionConfig, element_size: int) -> int:
    """Returns the bytes that autograd keeps per box, summed over the three box stages."""
    elements = _convolved(settings, _BOX_SIDE, element_size)
    # The linear layer's input is a copy of the last map; its output has one element per unit.
    elements += (settings.pyramid_channels * _BOX_SIDE**2 + settings.box_width) * element_size
    return _STAGES * (elements + (settings.num_classes + 1) * _FLOAT)


def _mask(settings: DetectionConfig, element_size: int) -> int:
    """Returns the bytes kept per box for the mask head."""
    enlarged = 4 * _MASK_SIDE**2
    kept = _convolved(settings, _MASK_SIDE, element_size) + enlarged * settings.pyramid_channels * element_size
    return kept + 2 * enlarged * _FLOAT  # logits and true cells of one class


def _convolved(settings: DetectionConfig, side: int, element_size: int) -> int:
    """Returns the bytes kept per box: for the pooled features, and for each convolution with its norm and ReLU."""
    cells = side**2
    # The input of the first convolution, and per convolution the inputs of its norm and ReLU.
    elements = (1 + 2 * _CONVS) * element_size * settings.pyramid_channels
    return cells * (elements + 2 * _CONVS * _FLOAT)
