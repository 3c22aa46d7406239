"""placeholder until merge"""

import torch


def add_branch(residual, partial, slices, biases, factor):
    b = torch.cat([b.expand(stop - start, -1) for (start, stop), b in zip(slices, biases, strict=True)])
    y = partial + b
    return residual + (y if factor is None else y * factor.unsqueeze(1))
