"""Estimates the activation memory of a simple feature pyramid, for `beit3 check`."""

_STATISTIC, _INDEX = 4, 8  # bytes


def pyramid_memory(hidden_size: int, channels: int, element_size: int) -> float:
    """Returns the memory of a `SimpleFeaturePyramid`'s maps and of the tensors that autograd saves, in bytes per patch.

    Autograd saves the inputs of convolutions, activation functions and norms. It also saves the statistics of norms and
    the indices of max pooling. The estimate assumes that all images have the same size, so that the maps need no
    padding.

    Args:
        hidden_size: hidden size of the backbone.
        channels: number of channels of each map.
        element_size: bytes per element of a map or of a saved input.
    """
    # Per map: its cells per patch, and the input elements per patch of its first convolution to `channels` channels.
    entering = {16: 4 * hidden_size, 4: 2 * hidden_size, 1: hidden_size, 1 / 4: hidden_size / 4}
    # Between the transposed convolutions of the finest map: the inputs of the norm, the GELU and the second one.
    elements = 3 * 4 * hidden_size / 2 + sum(entering.values())
    # Per map: the inputs of a norm, of a convolution and of a second norm, and the map itself.
    elements += 4 * channels * sum(entering)
    statistics = 2 * (4 + 2 * sum(entering))  # one norm between the transposed convolutions, two per map
    return elements * element_size + statistics * _STATISTIC + hidden_size / 4 * _INDEX
