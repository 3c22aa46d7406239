"""Tests the predicted needs of a node beside its GPUs."""

import dataclasses
from typing import Any

import pytest

from beit3_ds.config import ConfigError, RunConfig, build_run_config, load_run_config
from beit3_ds.config.prefetch import image_bytes, plan_prefetch
from beit3_ds.planner import HostRequirements, NodeSize, check_node, describe_host, host_requirements
from tests.run_config import small_run_mapping

GIB = 1 << 30
GPU_CONFIGS = {
    "base_8gpu": 8,
    "giant_zero3_64gpu": 64,
    "giant_tp2_pp4_zero3": 64,
    "beit3_4b_tp2_pp2_zero1": 32,
    "beit3_10b_tp4_pp4_zero1": 128,
}


def requirements(config: RunConfig, world_size: int, ranks_per_node: int) -> HostRequirements:
    return host_requirements(config, world_size, ranks_per_node)


def config(zero: dict[str, Any] | None = None, **parallel: int) -> RunConfig:
    mapping = small_run_mapping(3, samples=(8, 8, 8), accumulation=4)
    mapping["zero_optimization"] |= zero or {}
    mapping["beit3_ds"]["data"] |= {"num_workers": 2, "prefetch_steps": 1}
    mapping["beit3_ds"]["parallel"] = parallel
    return build_run_config(mapping)


@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_shipped_configs_fit_a_usual_node(name: str) -> None:
    """Checks the shipped configurations on a typical node: 8 GPUs and 512 GiB of memory, half of it for /dev/shm."""
    found = load_run_config(f"ds_configs/{name}.json")
    node = NodeSize(memory=512 * GIB, shm=256 * GIB)
    check_node(requirements(found, GPU_CONFIGS[name], 8), found, node)
    assert found.data.cache_dir  # else every rank and worker holds all tokens
    assert requirements(found, GPU_CONFIGS[name], 8).shm <= 64 * GIB  # catches a bound that more workers pass


def test_shared_memory_is_that_of_the_ranks_that_read() -> None:
    plain = config()
    assert requirements(plain, 4, 4).shm == 4 * plan_prefetch(plain, 4).num_bytes
    divided = config(tensor_parallel_size=2, pipeline_parallel_size=2)
    # of 8 ranks, 2 data-parallel ones on the first stage and 2 on the last read, each one view
    views = [plan_prefetch(divided, 2, view).num_bytes for view in ("model", "tokenizer")]
    assert requirements(divided, 8, 8).shm == 2 * sum(views)
    assert requirements(divided, 8, 4).shm == 2 * max(views)  # catches the average of the nodes
    assert requirements(divided, 8, 8).num_workers == 4 * 2


def test_validation_batches_hold_the_images_of_both_kinds() -> None:
    found = []
    for kinds in ((), ("images",), ("pairs",), ("images", "pairs")):
        mapping = small_run_mapping(3, samples=(8, 8, 8), accumulation=4)
        for kind in ("images", "pairs"):
            mapping["beit3_ds"]["data"][kind]["validation"] = [{"path": "apart/*.tar"}] if kind in kinds else []
        run = build_run_config(mapping)
        found.append(requirements(run, 2, 2).validation)
    bytes_of_kind = run.training.loss_samples * image_bytes(run)  # both ranks together
    assert found == [0, bytes_of_kind, bytes_of_kind, 2 * bytes_of_kind]


def test_offloaded_state_is_host_memory() -> None:
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    kept, moved = requirements(config(), 2, 2), requirements(config(offload), 2, 2)
    assert (kept.offloaded, kept.pinned) == (0, 0)
    assert moved.offloaded == moved.pinned > 2 * moved.checkpoint / 2
    assert moved.memory - kept.memory == moved.offloaded


@pytest.mark.parametrize(
    ("node", "named"),
    [
        (NodeSize(shm=1, name="host gpu7"), r"/dev/shm on a node, but host gpu7 has 0\.0 GiB.*data\.prefetch_gib"),
        (NodeSize(memory=GIB, name="host gpu7"), r"memory on a node .*but host gpu7 has 1\.0 GiB.*data\.num_workers"),
    ],
)
def test_what_a_node_lacks_is_named(node: NodeSize, named: str) -> None:
    run = config()
    check_node(requirements(run, 4, 4), run, dataclasses.replace(node, memory=None, shm=None))
    with pytest.raises(ConfigError, match=named):
        check_node(requirements(run, 4, 4), run, node)


def test_the_table_says_what_is_modelled_and_what_every_worker_would_hold() -> None:
    run = config()
    lines = describe_host(run, requirements(run, 4, 4), 4, step_seconds=0.5).splitlines()
    assert lines[0].startswith("one node of 4 ranks, modelled")
    assert any("in every rank and worker: set data.cache_dir" in line for line in lines)
    assert any(line.startswith("file reads per second, 0.5 s per step") and line.endswith(" 32") for line in lines)
