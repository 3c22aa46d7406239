"""Computes initial values of the detection head, as ViTDet's code (detectron2) does."""

import torch
from torch import Tensor, nn

_OUTPUT_STDS = {
    "proposals.objectness": 0.01,
    "proposals.deltas": 0.01,
    "classes": 0.01,
    "deltas": 0.001,
    "masks": 0.001,
}
"""Standard deviation of the initial weights of output layers. Each key is the end of a layer's name; the first key that
matches applies."""


def head_initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
    """Returns the initial value of a weight of `DetectionHead`; None for norms and biases.

    `initialize_parameters` sets weights of norms to 1, and biases to 0. The distribution of the other weights depends
    on the layer:

    - Output layers are normal with a small standard deviation.
    - Linear layers that are not output layers are uniform with variance 1 / inputs.
    - Convolutions that are not output layers follow Kaiming's normal distribution with `mode="fan_out"`.

    These scales keep the magnitude of features independent of the head's width. ViTDet initialises all convolutions of
    the proposal network with a fixed standard deviation of 0.01. In the proposal network, this function uses 0.01 only
    for the output layers, because 0.01 in other layers would make the features of a narrow head vanish.

    Args:
        name: name of the parameter within the head, such as `boxes.stages.0.linear.weight`.
        shape: shape of the parameter.
        generator: random generator.
    """
    layer, _, leaf = name.rpartition(".")
    if leaf != "weight" or len(shape) == 1:
        return None
    value = torch.empty(shape)
    for ending, std in _OUTPUT_STDS.items():
        if f".{layer}".endswith(f".{ending}"):
            return value.normal_(std=std, generator=generator)
    if len(shape) == 2:
        bound = (3 / shape[1]) ** 0.5
        return value.uniform_(-bound, bound, generator=generator)
    is_transposed = "upsampling" in layer or layer.endswith(("resampling", "enlarge"))  # (inputs, outputs, side, side)
    if is_transposed:  # torch takes the second size as inputs
        return nn.init.kaiming_normal_(value, mode="fan_in", nonlinearity="relu", generator=generator)
    return nn.init.kaiming_normal_(value, mode="fan_out", nonlinearity="relu", generator=generator)
