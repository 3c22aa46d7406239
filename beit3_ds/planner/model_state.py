"""Computes the bytes of one rank's training state, without activations, for models other than BEiT-3."""

from typing import NamedTuple

import torch

from beit3_ds.config import RunConfig
from beit3_ds.tasks import build_task

_SIZES = {"fp32": 4, "bf16": 2}


class ModelState(NamedTuple):
    """Holds the size of one rank's training state in bytes. Activations and DeepSpeed's buffers are not counted."""

    numel: int
    """Number of elements of all parameters of the whole model."""
    parameters: int
    """Bytes of the parameters; under ZeRO-3, only the rank's partition is counted."""
    gradients: int
    """Bytes of the gradients that the rank keeps until the update."""
    optimizer: int
    """Bytes of float32 master weights and Adam's two moments."""

    @property
    def total(self) -> int:
        """Returns the sum of parameters, gradients and optimizer state in bytes."""
        return self.parameters + self.gradients + self.optimizer

    def describe(self) -> str:
        """Formats the training state as a table."""
        rows = {
            "modelled, of one rank": "training state",
            "parameters, millions": f"{self.numel / 1e6:,.1f}",
            "memory, parameters, GiB": f"{self.parameters / 2**30:,.2f}",
            "memory, gradients, GiB": f"{self.gradients / 2**30:,.2f}",
            "memory, optimizer, GiB": f"{self.optimizer / 2**30:,.2f}",
            "memory, total without activations, GiB": f"{self.total / 2**30:,.2f}",
        }
        wide = max(map(len, rows))
        return "\n".join(f"{name.ljust(wide)}  {value:>14}" for name, value in rows.items())


def model_state(config: RunConfig, world_size: int) -> ModelState:
    """Computes the size of one rank's training state from the model's number of parameters.

    Args:
        config: the run's configuration.
        world_size: total number of ranks.

    Raises:
        ConfigError: if tensor-parallel size x pipeline-parallel size does not divide `world_size`.
    """
    ranks, options = config.parallel.data_parallel_size(world_size), config.options
    with torch.device("meta"):
        numel = sum(parameter.numel() for parameter in build_task(config).build_model().parameters())
    part = -(-numel // ranks)
    # In float32 without ZeRO the parameters are the master weights.
    own_bytes = 8 if options.zero_stage == 0 and not options.is_bf16 else 12
    return ModelState(
        numel=numel,
        parameters=(part if options.zero_stage == 3 else numel) * _SIZES[options.precision],
        gradients=(part if options.zero_stage >= 2 else numel) * _SIZES[options.grad_accum_dtype],
        optimizer=(part if options.zero_stage else numel) * own_bytes,
    )
