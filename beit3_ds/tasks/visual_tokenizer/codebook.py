"""Gathers data over whole training steps, for the initial codebook and for the mean of the teacher's features.

The results do not depend on the layout of ranks.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch, StepBatch
from beit3_ds.config import RunConfig
from beit3_ds.parallel import Mesh
from beit3_ds.pixels import to_floats

_START_VECTORS_PER_CODE = 16  # BEiT v2's first batch has 512 * 196 / 8192 = 12


def start_steps(config: RunConfig, step: int) -> range:
    """Returns the numbers of the steps, from `step` on, that together have enough images to initialise the codebook."""
    visual = config.tokenizers.visual
    patches = config.data.images.samples_per_step * visual.grid_size**2
    return range(step, step + -(-_START_VECTORS_PER_CODE * visual.codebook_size // patches))


def mean_features(
    steps: Sequence[StepBatch], teacher: Callable[[Tensor], Tensor], mesh: Mesh, device: torch.device
) -> Tensor:
    """Returns the mean of the teacher's features over all patches in some steps, (features,) float32.

    The data-parallel ranks all-reduce the number of patches and the sum of each feature.

    Args:
        steps: this rank's samples of the steps.
        teacher: function from pixels to the features of each patch.
        mesh: mesh of all ranks.
        device: device of the teacher.
    """
    totals: Tensor | None = None
    for batch in _batches(steps):
        moved = batch.to(device)
        assert moved.pixels is not None, "every rank reads pixels"
        features = teacher(to_floats(moved.pixels, moved.colors)).flatten(0, 1).double()
        own = torch.cat([features.sum(0), features.new_full((1,), len(features))])
        totals = own if totals is None else totals + own
    assert totals is not None, "a step has a micro-batch"
    sums = mesh.data_host.sum(totals.cpu())
    return (sums[:-1] / sums[-1]).float()


def gather_vectors(steps: Sequence[StepBatch], vectors: Iterator[Tensor], mesh: Mesh) -> Tensor:
    """All-gathers the encoder's vectors of some steps, (patches, width) float32 on the CPU, equal on all ranks.

    In each step, the vectors are in the order of the step's samples, whatever the number of ranks and micro-batches.

    Args:
        steps: this rank's samples of the steps; all ranks have the same number of micro-batches.
        vectors: vectors of each micro-batch, (images, patches, width).
        mesh: mesh of all ranks.
    """
    gathered: list[Tensor] = []
    for _ in _batches(steps):
        own = next(vectors).flatten(0, 1).cpu()
        gathered += mesh.data_host.gather(own)
    return torch.cat(gathered)


def _batches(steps: Sequence[StepBatch]) -> Iterator[PackedBatch]:
    return (batch for step in steps for batch in step.micro_batches)
