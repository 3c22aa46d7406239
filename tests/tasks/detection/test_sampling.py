"""Tests that the sampling of anchors and proposals depends only on a seed, not on the rest of the batch."""

import torch

from beit3_ds.data.samples import SampleKey
from beit3_ds.tasks.detection.sampling import draw_seed, random_priorities, sample_balanced


def test_ranks_are_those_of_splitmix() -> None:
    """Checks that seed 0 and purpose 0 give the published sequence of SplitMix64."""
    ranks = [rank & (1 << 64) - 1 for rank in random_priorities(torch.tensor(0), 3, 0).tolist()]
    assert ranks == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_draws_are_even_and_differ_by_seed_and_purpose() -> None:
    counts = torch.zeros(40)
    everything, nothing = torch.ones(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)
    for seed in range(2000):
        positive, _ = sample_balanced(everything, nothing, 20, 0.5, random_priorities(torch.tensor(seed), 40, 1))
        assert len(positive) == 10
        counts[positive] += 1
    # A quarter of 2,000 draws with a standard deviation of 19; catches an order that the seed hardly changes.
    assert counts.min() > 420 and counts.max() < 580
    assert (random_priorities(torch.tensor(5), 40, 1) != random_priorities(torch.tensor(5), 40, 2)).all()


def test_candidates_are_balanced() -> None:
    ranks = random_priorities(torch.tensor(3), 10, 1)
    is_positive = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1, 0]).bool()
    positive, negative = sample_balanced(is_positive, ~is_positive, 6, 0.5, ranks)
    assert positive.tolist() == [0, 8] and len(negative) == 4 and not set(negative.tolist()) & {0, 8}
    _, more = sample_balanced(is_positive, ~is_positive, 100, 0.5, ranks)
    assert len(more) == 8
    none = torch.zeros(0, dtype=torch.bool)
    assert [len(drawn) for drawn in sample_balanced(none, none, 6, 0.5, random_priorities(torch.tensor(3), 0, 1))] == [
        0,
        0,
    ]


def test_seeds_are_functions_of_the_sample_and_the_epoch() -> None:
    seeds = {draw_seed(SampleKey(1, "images", epoch, index)) for epoch in range(3) for index in range(50)}
    assert len(seeds) == 150 and all(0 <= seed < 1 << 62 for seed in seeds)
    assert draw_seed(SampleKey(1, "images", 0, 7)) == draw_seed(SampleKey(1, "images", 0, 7))
