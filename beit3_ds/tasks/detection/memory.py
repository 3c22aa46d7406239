"""Estimates the memory that autograd keeps of the detection head, for `beit3 check`."""

from beit3_ds.config import ModelConfig
from beit3_ds.tasks.detection.config import DetectionConfig

_BOX_SIDE, _MASK_SIDE, _CONVS, _STAGES = 7, 14, 4, 3
_POSITIVE_SHARE = 0.25
_FLOAT, _INDEX = 4, 8  # bytes


def image_memory(model: ModelConfig, settings: DetectionConfig, element_size: int) -> int:
    """Returns the bytes that autograd keeps of the head's forward pass for one image.

    The image has `image_size` pixels on each side, all boxes are drawn, and a quarter of them are positive. Counts the
    inputs of convolutions, linear layers, activations and norms, and the statistics of norms: the pyramid's maps, the
    proposal network on five maps, three stages of boxes and the mask head. Does not count the anchors' outputs, which
    are small, nor the temporary memory of an operation, such as the float32 copies of maps in RoIAlign.

    Args:
        model: the model's sizes.
        settings: the task's settings.
        element_size: bytes per element of an activation.
    """
    total = _pyramid(model, settings, element_size) + settings.sampled_boxes * _box(settings, element_size)
    if settings.masks:
        total += int(settings.sampled_boxes * _POSITIVE_SHARE) * _mask(settings, element_size)
    return total


def _pyramid(model: ModelConfig, settings: DetectionConfig, element_size: int) -> int:
    """Returns the bytes of the pyramid and the proposal network."""
    width, channels, patches = model.hidden_size, settings.pyramid_channels, model.num_patches
    # Each map's cells per patch, and the elements per patch that enter its first convolution to `channels` channels.
    entering = {16: 4 * width, 4: 2 * width, 1: width, 1 / 4: width / 4}
    # Between the transposed convolutions of the finest map: the inputs of the norm, the GELU and the second one.
    elements = 3 * 4 * width / 2 + sum(entering.values())
    # Per map: the inputs of a norm, a convolution and a norm, the map itself, and the proposal network's two layers.
    elements += sum(cells * 6 * channels for cells in entering) + 3 * channels / 16  # the coarsest map has no layers
    if model.final_norm:
        elements += width
    statistics = 2 * (4 + 2 * sum(entering))  # one norm between the transposed convolutions, two per map
    indices = width / 4 + channels / 16  # of both max poolings
    return int(patches * (elements * element_size + statistics * _FLOAT + indices * _INDEX))


def _box(settings: DetectionConfig, element_size: int) -> int:
    """Returns the bytes that the three stages keep per box."""
    elements = _convolved(settings, _BOX_SIDE, element_size)
    # The linear layer's input is a copy of the last map; its output has one element per unit.
    elements += (settings.pyramid_channels * _BOX_SIDE**2 + settings.box_width) * element_size
    return _STAGES * (elements + (settings.num_classes + 1) * _FLOAT)


def _mask(settings: DetectionConfig, element_size: int) -> int:
    """Returns the bytes that the mask head keeps per box."""
    enlarged = 4 * _MASK_SIDE**2
    kept = _convolved(settings, _MASK_SIDE, element_size) + enlarged * settings.pyramid_channels * element_size
    return kept + 2 * enlarged * _FLOAT  # logits and true cells of one class


def _convolved(settings: DetectionConfig, side: int, element_size: int) -> int:
    """Returns the bytes of a box's pooled features and of its convolutions, each with a norm and a ReLU."""
    cells = side**2
    # RoIAlign's output in float32, the first convolution's input, and per convolution the norm's input and the ReLU's.
    elements = (_FLOAT + (1 + 2 * _CONVS) * element_size) * settings.pyramid_channels
    return cells * (elements + 2 * _CONVS * _FLOAT)
