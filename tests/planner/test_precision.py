"""Tests the cost of float32 in a bf16 run, as `beit3 check` prints it."""

from beit3_ds.planner import describe_precision, precision_cost
from tests.planner.cells import cell


def test_a_float32_run_has_no_table() -> None:
    assert describe_precision(cell(1), 2) == ""


def test_float32_costs_memory_and_time() -> None:
    wide, narrow = cell(1, bf16=True, wide=True), cell(1, bf16=True)
    more, less = precision_cost(wide, 2), precision_cost(narrow, 2)
    assert more.memory > less.memory and more.seconds > less.seconds
    assert more.sent == less.sent  # without stages and tensor parallelism the stream is never sent
    lines = describe_precision(narrow, 2).splitlines()[1:]
    assert [line.endswith("(set)") for line in lines] == [False, True, False, True]
    lines = describe_precision(wide, 2).splitlines()[1:]
    assert [line.endswith("(set)") for line in lines] == [True, False, True, False]
    assert f"{more.memory / 2**30:.2f} GiB" in lines[0]
