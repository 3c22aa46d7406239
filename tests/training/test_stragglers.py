"""Tests that exactly the slow ranks are named."""

import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.config import RankCoords
from beit3_ds.parallel import Mesh, PipelineParallel
from beit3_ds.pipeline.stopwatch import Stopwatch
from beit3_ds.training.stragglers import Stragglers
from tests.ranks import run_ranks

STAGES, RANKS_A_STAGE = 2, 4


def compare(work: list[float], data: list[float], step_seconds: float) -> tuple[dict[str, Any], list[str]]:
    """Compares the ranks of two stages with four data-parallel ranks each."""
    all_coords = tuple(RankCoords(stage, data, 0) for stage in range(STAGES) for data in range(RANKS_A_STAGE))
    hosts = tuple(f"node{rank // 4}" for rank in range(len(all_coords)))
    mesh = Mesh(all_coords=all_coords, hosts=hosts, pipeline=PipelineParallel(ranks=(0, RANKS_A_STAGE)))
    watch = Stopwatch(torch.device("cpu"))
    return Stragglers(mesh, watch, watch)._compare(torch.tensor([work, data], dtype=torch.float64).T, step_seconds)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 7), st.lists(st.floats(0.95, 1.05), min_size=8, max_size=8))
def test_one_slow_rank_of_a_stage(slow: int, noise: list[float]) -> None:
    """Catches comparisons across pipeline stages, which have different work.

    The noise is at most 5%: with more, a rank of the first stage could be slowed more than the faulty rank of the
    second.
    """
    work = [value * (1.0 if rank < RANKS_A_STAGE else 0.2) for rank, value in enumerate(noise)]
    figures, lines = compare(work, [0.0] * 8, 1.0)
    assert lines == []
    work[slow] *= 2
    figures, (line,) = compare(work, [0.0] * 8, 1.0)
    assert figures["work_slowest_rank"] == slow and figures["work_seconds"] == pytest.approx(work[slow])
    coords = f"stage {slow // 4}, data-parallel rank {slow % 4}, tensor-parallel rank 0, host node{slow // 4}"
    assert line.startswith(f"straggler: rank {slow} ({coords}) takes {work[slow]:.3f} s per step for its own work, ")
    assert figures["work_seconds_median"] < 1.2 and work[slow] / figures["work_seconds_median"] > 1.6


def test_short_times_are_left_alone() -> None:
    """Catches a report about negligible times: in a step of 1 s, waiting 10 ms instead of 1 ms does not matter."""
    figures, lines = compare([1.0] * 8, [0.001] * 7 + [0.01], 1.0)
    assert lines == [] and figures["data_slowest_rank"] == 7
    _, (line,) = compare([1.0] * 8, [0.001] * 7 + [0.2], 1.0)
    assert "takes 0.200 s per step for its data, the median of its stage is 0.001 s (a step takes 1.000 s)" in line


def test_a_slow_host_is_cut_short() -> None:
    _, lines = compare([3.0, 1.0, 1.0, 1.0] * 2, [0.0, 1.0, 0.0, 0.0] * 2, 3.0)
    assert [line.split(" (")[0] for line in lines] == [
        *("straggler: rank 0", "straggler: rank 4", "straggler: rank 1", "straggler: rank 5")
    ]


def train_slowly(config: str) -> tuple[int, str]:
    """Trains on one rank; the first rank reads data slowly, and the second has a slow device."""
    from beit3_ds.data.steps import StepDataset
    from beit3_ds.train import main
    from beit3_ds.training import loop

    read, prepare = StepDataset.__getitem__, loop.prepare_batch

    def read_slowly(dataset: Any, step: int) -> Any:
        time.sleep(0.4 * (torch.distributed.get_rank() == 0))
        return read(dataset, step)

    def prepare_slowly(*arguments: Any) -> Any:
        time.sleep(0.6 * (torch.distributed.get_rank() == 1))
        return prepare(*arguments)

    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(StepDataset, "__getitem__", read_slowly)
        patch.setattr(loop, "prepare_batch", prepare_slowly)
        status = main([config])
    return status, output.getvalue()


@pytest.mark.slow
def test_stragglers_of_a_run_are_named(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Catches a comparison of whole step times, which are equal because each rank delays the other."""
    run_mapping["beit3_ds"]["data"]["num_workers"] = 0
    run_mapping["beit3_ds"]["training"] |= {"log_interval": 4, "eval_interval": 100}
    (tmp_path / "config.json").write_text(json.dumps(run_mapping))
    (status, output), _ = run_ranks(train_slowly, 2, str(tmp_path / "config.json"))
    assert status == 0
    work, data = (line for line in output.splitlines() if line.startswith("straggler: "))
    assert "rank 1 (" in work and "for its own work" in work
    assert "rank 0 (" in data and "for its data" in data
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (record,) = (record for record in records if record["kind"] == "train")
    assert (record["work_slowest_rank"], record["data_slowest_rank"]) == (1, 0)
    assert record["work_seconds"] > 0.6 and record["data_seconds"] > 0.4
