"""Tests that a broken record counts once across repeated reads, epochs, ranks and restarts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.batch import PackedBatch, StepBatch
from beit3_ds.config import ConfigError
from beit3_ds.parallel import Mesh
from beit3_ds.parallel.host_group import HostGroup
from beit3_ds.training.broken_records import (
    BROKEN_RECORDS,
    BrokenRecords,
    StepCounts,
    format_new_records,
    records_from,
)
from tests.batches import random_batch, small_model_config
from tests.ranks import run_ranks

BATCH: PackedBatch = random_batch(small_model_config(), 1, 1, 1)


def step(number: int, *names: str, reason: str = "broken image") -> StepBatch:
    broken = {name: f"{name}: {reason}" for name in names}
    return StepBatch(step=number, micro_batches=(BATCH, BATCH), broken_records=broken)


def test_a_record_counts_once_however_often_it_is_met() -> None:
    """Catches a count of reads: once, 5 broken files of a small source counted as 16 by step 150."""
    counts = StepCounts(BrokenRecords(5, HostGroup()), Mesh())
    lines: list[str] = []
    for number in range(150):
        # The reason may differ between reads, because it may contain an address.
        masked, new = counts.agree(step(number, f"shard.tar:{number % 5}", reason=f"<BytesIO at {number:#x}>"))
        assert masked.tolist() == [2 * count for count in BATCH.term_counts]
        lines += new
    assert counts.records.total == 5
    assert [line.partition(": ")[0] for line in lines] == [f"shard.tar:{i}" for i in range(5)]  # each name once


def test_too_many_stop_the_run_with_all_their_names() -> None:
    counts = StepCounts(BrokenRecords(2, HostGroup()), Mesh())
    counts.agree(step(0, "a"))
    counts.agree(step(1, "b", "a"))
    with pytest.raises(ConfigError, match=r"3 broken records by step 3, more than data.max_broken_records=2") as caught:
        counts.agree(step(2, "c"))
    assert all(f"{name}: broken image" in str(caught.value) for name in "abc")


@given(st.lists(st.sets(st.integers(0, 9)), max_size=8), st.integers(0, 8))
def test_a_resumed_run_counts_as_one_that_was_not_interrupted(met: list[set[int]], cut: int) -> None:
    """Catches a count that restarts from 0, and a record that is reported twice."""
    steps = [step(number, *map(str, sorted(names))) for number, names in enumerate(met)]
    unbroken = StepCounts(BrokenRecords(10, HostGroup()), Mesh())
    expected = [line for batch in steps for line in unbroken.agree(batch)[1]]
    before = StepCounts(BrokenRecords(10, HostGroup()), Mesh())
    found = [line for batch in steps[:cut] for line in before.agree(batch)[1]]
    data = {BROKEN_RECORDS: before.records.state()}  # as in a checkpoint's index
    after = StepCounts(BrokenRecords(10, HostGroup(), records_from(data)), Mesh())
    found += [line for batch in steps[cut:] for line in after.agree(batch)[1]]
    assert found == expected
    assert after.records.state() == unbroken.records.state()
    assert records_from({}) == {}


def test_lines_say_how_many_there_may_be() -> None:
    assert format_new_records(["x: empty", "y: empty"], total=7, limit=9) == [
        "left out broken record 6 of at most 9: x: empty",
        "left out broken record 7 of at most 9: y: empty",
    ]


def meet_on_a_rank() -> list[object]:
    from beit3_ds.runtime.process_group import init_process_group
    from tests.run_config import small_run_config

    mesh = init_process_group(small_run_config(0).parallel)
    counts = StepCounts(BrokenRecords(3, mesh.data_host), mesh)
    own = [("a",), ("b", "a"), (), ("c",)] if mesh.data_parallel_rank == 0 else [("a",), (), ("b",), ("d",)]
    found: list[object] = []
    for number, names in enumerate(own):
        try:
            masked, new = counts.agree(step(number, *names))
        except ConfigError as error:
            found.append(str(error))
        else:
            assert torch.equal(masked, 4 * torch.tensor(BATCH.term_counts))
            found.append([line.partition(": ")[0] for line in new])
    mesh.close()
    return found


def test_ranks_count_a_record_once_between_them() -> None:
    """Catches ranks that count the same record twice, and ranks that stop at different steps."""
    first, second = run_ranks(meet_on_a_rank, 2)
    assert first == second
    assert first[:3] == [["a"], ["b"], []]
    assert "4 broken records by step 4" in str(first[3])
