"""Tests that a step equals the step of one process when ranks or micro-batches have uneven or zero samples."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.config import SampleCounts, StepShares
from beit3_ds.parallel import Mesh
from tests.ranks import run_ranks
from tests.test_train import finish, losses, train_rank, write
from tests.training.layouts import Layout
from tests.training.steps import MIXES, NUM_LAYERS, SHALLOW, Deal, Reference, check, config_for, measure_steps

MICRO_BATCHES = 4


def deals(ranks: int) -> list[Deal]:
    """Returns three steps of 8 samples, each divided over ranks and micro-batches in another way.

    The first step is divided as in a run, and the second has empty micro-batches first. In the third, one rank has all
    samples; a run would refuse that as wasteful, but the result must be right.
    """
    shares = StepShares(samples=SampleCounts(0, 0, len(MIXES)), num_ranks=ranks, num_micro_batches=MICRO_BATCHES)
    as_run = [[list(cell["texts"]) for cell in shares.slots(rank)] for rank in range(ranks)]
    empty_first = [list(reversed(rank)) for rank in reversed(as_run)]
    one_has_all: Deal = [[[0, 1, 2], [], [3, 4], [5, 6, 7]], *([[]] * MICRO_BATCHES for _ in range(ranks - 1))]
    return [as_run, empty_first, one_has_all]


Variants = list[tuple[int, dict[str, Any]]]
"""ZeRO stages, each with additional keys of `zero_optimization`."""
VARIANTS: dict[str, Variants] = {
    "ZeRO 0 to 3": [(stage, {}) for stage in range(4)],
    "offloaded": [(stage, {"offload_optimizer": {"device": "cpu"}}) for stage in (1, 2, 3)],
}


def measure(layout: Layout, variants: Variants, reference: Reference, num_layers: int) -> list[dict[str, float]]:
    """Returns, on one rank, the ratio of error to allowed error of each loss, norm, gradient and weight."""
    from beit3_ds.runtime.process_group import init_process_group

    mesh: Mesh = init_process_group(config_for(0, **layout.parallel).parallel)
    results = []
    for zero_stage, keys in variants:
        config = config_for(zero_stage, num_layers=num_layers, **layout.parallel)
        zero = config.deepspeed["zero_optimization"]
        zero.update(keys)
        found = measure_steps(config, mesh, deals(layout.data))
        results.append(reference.ratios(found, "paper", num_layers))
    mesh.close()
    return results


def run(layout: Layout, name: str, reference: Reference, num_layers: int) -> None:
    variants = VARIANTS[name]
    results = run_ranks(measure, layout.num_ranks, layout, variants, reference, num_layers, timeout=1500)
    for variant, ratios in zip(variants, zip(*results, strict=True), strict=True):
        worst = check(ratios, reference.load("paper", num_layers), f"{layout}, ZeRO {variant}")
        print(f"{layout}, ZeRO {variant}: worst error {worst:.2f} of the bound")


@pytest.mark.parametrize("ranks", [3])
def test_data_parallel_ranks(ranks: int, reference: Reference) -> None:
    """Catches a mean of the ranks' means in place of the mean over all samples of the step."""
    run(Layout(1, 1, ranks), "ZeRO 0 to 3", reference, SHALLOW)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "variants"),
    [
        (Layout(1, 1, 7), "ZeRO 0 to 3"),
        (Layout(1, 1, 7), "offloaded"),
        (Layout(2, 1, 3), "offloaded"),
        (Layout(1, 2, 3), "offloaded"),
        (Layout(2, 1, 3), "ZeRO 0 to 3"),
        (Layout(2, 1, 3, sequence_parallel=True), "ZeRO 0 to 3"),
        (Layout(1, 2, 3), "ZeRO 0 to 3"),
        (Layout(1, 2, 3, interleaved=True), "ZeRO 0 to 3"),
        (Layout(2, 2, 3), "ZeRO 0 to 3"),
        (Layout(2, 1, 7), "ZeRO 0 to 3"),
        (Layout(1, 2, 7), "ZeRO 0 to 3"),
    ],
    ids=str,
)
def test_layouts(layout: Layout, variants: str, reference: Reference) -> None:
    """Compares steps on 7 of 8 data-parallel ranks, and in layouts with tensor-parallel ranks and pipeline stages."""
    run(layout, variants, reference, NUM_LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=str)
def test_a_run_lies_on_that_of_one_rank(run_mapping: dict[str, Any], tmp_path: Path, parallel: dict[str, int]) -> None:
    """Compares losses, norms and data order of whole runs that read data; then one rank resumes the run."""
    own = run_mapping["beit3_ds"]
    run_mapping["gradient_accumulation_steps"] = 2
    own["model"]["drop_path_rate"] = 0.2
    for stream in ("images", "pairs", "texts"):
        own["data"][stream]["samples_per_step"] = 4
    status, output = finish(write(run_mapping, tmp_path))
    assert status == 0, output

    own["parallel"] = parallel
    own["training"]["output_dir"] = str(tmp_path / "uneven")
    ranks = 3 * math.prod(parallel.values())
    assert run_ranks(train_rank, ranks, str(write(run_mapping, tmp_path, "uneven.json"))) == [0] * ranks
    found, expected = losses(tmp_path / "uneven"), losses(tmp_path / "run")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours == pytest.approx(theirs, rel=2e-4)  # catches a sample that two ranks or none read

    shutil.rmtree(tmp_path / "uneven" / "checkpoints" / "step-00000004")
    own["parallel"] = {}
    status, output = finish(write(run_mapping, tmp_path, "uneven.json"))
    assert (status, "resuming after step 3" in output) == (0, True), output
    assert "data." not in output.split("resuming after step 3")[1].split("| loss")[0]  # the data have not changed
    last = losses(tmp_path / "uneven")[-1]
    assert last.pop("kind") == "validation"
    assert last == pytest.approx(found[-1], rel=1e-5)
