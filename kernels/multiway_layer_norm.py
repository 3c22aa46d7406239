"""placeholder until merge"""

import torch
import torch.nn.functional as F


def multiway_layer_norm(x, slices, weights, biases, epsilon):
    parts = [
        F.layer_norm(x[a:b], x.shape[1:], w, c, epsilon) for (a, b), w, c in zip(slices, weights, biases, strict=True)
    ]
    return x, torch.cat(parts)
