"""Compares a pipeline's bubble with a simulation of its schedule, and tests the table of stages."""

import pytest

from beit3_ds.pipeline.schedule_1f1b import schedule_1f1b
from beit3_ds.planner import bubble_share, describe_stages
from beit3_ds.planner.stages import imbalance
from tests.planner.cells import cell

FORWARD, BACKWARD = 1.0, 2.0  # time of a pass through one model chunk


def simulate(num_micro_batches: int, num_stages: int, num_chunks: int) -> float:
    """Returns the time of a step without communication; each model chunk waits for the previous or next one."""
    ends: dict[tuple[bool, int, int], float] = {}
    orders = [list(schedule_1f1b(num_micro_batches, s, num_stages, num_chunks)) for s in range(num_stages)]
    clocks, last = [0.0] * num_stages, num_stages * num_chunks - 1
    while any(orders):
        for stage, order in enumerate(orders):
            while order:
                forward, micro_batch, own = order[0]
                chunk = own * num_stages + stage
                before = chunk - 1 if forward else chunk + 1
                needed = (True, micro_batch, chunk) if not forward and chunk == last else (forward, micro_batch, before)
                if not (forward and chunk == 0) and needed not in ends:
                    break
                start = max(clocks[stage], ends.get(needed, 0.0))
                clocks[stage] = ends[forward, micro_batch, chunk] = start + (FORWARD if forward else BACKWARD)
                order.pop(0)
    return max(clocks)


@pytest.mark.parametrize(
    ("stages", "micro_batches", "virtual"), [(1, 3, 1), (2, 2, 1), (4, 4, 1), (4, 9, 1), (2, 4, 2), (2, 8, 3)]
)
def test_the_bubble_is_that_of_the_schedule(stages: int, micro_batches: int, virtual: int) -> None:
    config = cell(
        1,
        micro_batches,
        pipeline_parallel_size=stages,
        virtual_pipeline_parallel_size=virtual,
    )
    time = simulate(micro_batches, stages, virtual)
    work = micro_batches * virtual * (FORWARD + BACKWARD)
    assert bubble_share(config) == pytest.approx(1 - work / time)


def test_the_table_has_a_column_per_stage() -> None:
    config = cell(1, 4, pipeline_parallel_size=2)
    *rows, last = describe_stages(config, 4).splitlines()
    assert rows[0].split()[-4:] == ["stage", "0", "stage", "1"]
    layers = next(row for row in rows if row.startswith("layers"))
    assert "embeddings+" in layers and layers.endswith("heads")
    assert last == f"pipeline bubble 20.0% of a step; slowest stage {imbalance(config):.1%} over average"
    assert imbalance(cell(1)) == 0 < imbalance(config)
