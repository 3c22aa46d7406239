"""Tests that the shorter functions for ZeRO-3 compute what DeepSpeed's own compute."""

import itertools

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.steps import config_for

# The buckets hold several gradients, one, and one that is padded; some gradients have fewer elements than ranks.
BUCKETS = [[(6, 4), (5,), (2,), (3, 3, 3), (12,)], [(6, 4)], [(7,)]]


def reduce_both_ways() -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Returns this rank's part of each mean, by this project and by DeepSpeed, and the elements per part."""
    from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced

    from beit3_ds.pipeline.zero3_host_time import _reduce_scatter
    from beit3_ds.runtime.process_group import init_process_group

    init_process_group(config_for(3).parallel)
    torch.manual_seed(torch.distributed.get_rank())
    results = []
    for shapes, buffer in itertools.product(BUCKETS, [None, torch.ones(12), torch.ones(1000)]):
        gradients = [torch.randn(shape) for shape in shapes]
        gradients[0] = gradients[0].mT if gradients[0].dim() == 2 else gradients[0]  # not contiguous
        expected = reduce_scatter_coalesced([torch.clone(g, memory_format=torch.contiguous_format) for g in gradients])
        sizes = [-(-gradient.numel() // torch.distributed.get_world_size()) for gradient in gradients]
        results += list(
            zip((part.clone() for part in _reduce_scatter(gradients, None, buffer)), expected, sizes, strict=True)
        )
    return results


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_gradients_are_reduced_as_by_deepspeed(num_ranks: int) -> None:
    """Catches parts of other ranks, sums instead of means, and padding that is not zero."""
    for results in run_ranks(reduce_both_ways, num_ranks):
        for found, expected, size in results:
            assert torch.equal(found[: expected.numel()], expected)
            assert len(found) == size and not found[expected.numel() :].any()
