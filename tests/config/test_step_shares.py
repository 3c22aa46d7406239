"""Tests how a step's samples are divided over ranks and micro-batches, and the batch size that DeepSpeed gets."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.config import ConfigError, SampleCounts, StepShares, build_run_config, check_layout, fits_layout
from tests.run_config import small_run_mapping


def shares_of(samples: tuple[int, int, int], ranks: int, micro_batches: int = 1) -> StepShares:
    return StepShares(samples=SampleCounts(*samples), num_ranks=ranks, num_micro_batches=micro_batches)


SAMPLES = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))


@settings(deadline=None, max_examples=150)
@given(SAMPLES, st.integers(1, 9), st.integers(1, 5))
def test_every_slot_is_in_one_share(samples: tuple[int, int, int], ranks: int, micro_batches: int) -> None:
    shares = shares_of(samples, ranks, micro_batches)
    slots = [shares.slots(rank) for rank in range(ranks)]
    cells = [slots[rank][number] for number in range(micro_batches) for rank in range(ranks)]
    for stream, count in zip(SampleCounts._fields, samples, strict=True):
        # catches a slot that is dealt twice or to nobody, and another order than by micro-batch and rank
        assert [slot for cell in cells for slot in cell[stream]] == list(range(count))
        sizes = [len(cell[stream]) for cell in cells]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) == getattr(shares.largest_micro_batch, stream)
        per_rank = [sum(len(cell[stream]) for cell in rank) for rank in slots]
        assert max(per_rank) - min(per_rank) <= 1  # catches micro-batches whose extra samples add up on one rank
    totals = [sum(len(slots) for cell in rank for slots in cell.values()) for rank in slots]
    # catches streams that all give their extra samples to the same ranks
    assert (min(totals), max(totals)) == (shares.fewest_rank_samples, shares.most_rank_samples)
    assert totals[0] == max(totals)  # whose costs stand for all
    for rank in slots:
        of_micro_batch = [sum(map(len, cell.values())) for cell in rank]
        assert max(of_micro_batch) - min(of_micro_batch) <= 1


@given(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), st.integers(1, 8), st.integers(1, 4))
def test_even_shares_keep_their_slots(factors: tuple[int, int, int], ranks: int, micro_batches: int) -> None:
    """Catches a change of the slots that each rank gets when the samples divide evenly."""
    shares = shares_of(tuple(factor * ranks * micro_batches for factor in factors), ranks, micro_batches)
    assert shares.is_even
    for rank in range(ranks):
        for number, cell in enumerate(shares.slots(rank)):
            for stream, size in zip(SampleCounts._fields, factors, strict=True):
                first = (number * ranks + rank) * size
                assert list(cell[stream]) == list(range(first, first + size))


def test_eight_samples_over_three_ranks() -> None:
    shares = shares_of((0, 8, 0), 3)
    assert [shares.rank_samples(rank).pairs for rank in range(3)] == [3, 3, 2]


@pytest.mark.parametrize("ranks", [3, 7, 8])
def test_the_engine_is_told_the_largest_share(ranks: int) -> None:
    """Catches a batch size that DeepSpeed refuses.

    DeepSpeed requires train_batch_size = micro-batch size x accumulation x ranks.
    """
    config = build_run_config(small_run_mapping(1, samples=(8, 8, 8)) | {"train_batch_size": 24})
    engine = config.engine_config(ranks)
    assert "train_batch_size" not in engine
    assert engine["train_micro_batch_size_per_gpu"] == -(-24 // ranks)
    assert engine["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize(
    ("keys", "ranks", "message"),
    [
        ({}, 25, r"24 samples per step are fewer than the 25 data-parallel ranks.*at most 24 data-parallel ranks"),
        ({"train_batch_size": 100}, 1, r"train_batch_size=100 contradicts the streams, which have 24.*Leave the key"),
        ({"train_batch_size": 100}, 7, r"train_batch_size=100 contradicts the streams"),
        ({"train_micro_batch_size_per_gpu": 8}, 2, r"=8 contradicts the streams: 24 .*2 ranks .* gives 12. Leave"),
        ({"train_micro_batch_size_per_gpu": 12}, 7, r"=12 cannot hold for every micro-batch: 24 .*7 ranks.*Leave"),
    ],
)
def test_batch_sizes_that_cannot_be(keys: dict[str, int], ranks: int, message: str) -> None:
    config = build_run_config(small_run_mapping(1, samples=(8, 8, 8)) | keys)
    with pytest.raises(ConfigError, match=message) as caught:
        check_layout(config, ranks)
    # Other layouts are offered where they help: a wrong number in the file fits none.
    assert ("layout" in str(caught.value).lower()) is not bool(keys)


def test_batch_sizes_that_hold() -> None:
    keys = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 12}
    config = build_run_config(small_run_mapping(1, samples=(8, 8, 8)) | keys)
    assert check_layout(config, 2) == 2 and config.step_shares(2).is_even
    assert not fits_layout(config, 3)


@pytest.mark.parametrize(
    ("tensor", "stages", "world_size", "fits"), [(1, 1, 7, True), (2, 2, 28, True), (2, 2, 30, False)]
)
def test_seven_of_eight_nodes_fit(tensor: int, stages: int, world_size: int, fits: bool) -> None:
    """Checks that any data-parallel size is accepted if the ranks form whole copies of the model."""
    mapping = small_run_mapping(1, samples=(32, 32, 32), accumulation=4)
    mapping["beit3_ds"]["parallel"] = {"tensor_parallel_size": tensor, "pipeline_parallel_size": stages}
    assert fits_layout(build_run_config(mapping), world_size) is fits


def test_check_says_how_uneven() -> None:
    from beit3_ds.training.dry_run import describe_dry_run

    mapping = small_run_mapping(1, samples=(8, 8, 8), accumulation=2)
    text = describe_dry_run(build_run_config(mapping), 7)
    (line,) = (line for line in text.splitlines() if line.startswith("micro-batch"))
    # 24 samples over 7 ranks: 4, 4, 4, 3, 3, 3, 3; 7 x 4 would fit in the time of the largest
    assert "1 to 2 samples per data-parallel rank: 0 to 1 images, 0 to 1 pairs, 0 to 1 texts; 2 per step" in line
    assert "Uneven: 3 or 4 samples per rank and step, 14.3% of the ranks' time waits for the largest" in line
    assert "Uneven" not in describe_dry_run(build_run_config(mapping), 4)
