"""Checks the sizes of real micro-batches and of expected ones."""

from beit3_ds.planner import expected_workloads, workload_of
from beit3_ds.tasks.pretraining.config import pretraining_config
from tests.batches import random_batch
from tests.planner.cells import cell


def test_dropped_branches_have_fewer_rows() -> None:
    model = cell(1, model={"drop_path_rate": 0.9}).model
    dropped = workload_of(random_batch(model, 3, 3, 6, seed=1, drop_path=True))
    assert len(dropped.kept_rows) == model.num_layers and dropped.drops
    assert all(kept.ffn <= dropped.rows for kept in dropped.kept_rows)
    assert min(kept.attention for kept in dropped.kept_rows) < dropped.rows
    every = workload_of(random_batch(model, 3, 3, 6, seed=1))
    assert every.kept_rows == () and not every.drops
    assert every._replace(drops=True, kept_rows=dropped.kept_rows) == dropped


def test_expected_micro_batches_are_those_of_the_largest_rank() -> None:
    config = cell(1, 3)  # 4 images, 4 pairs and 4 texts
    data, patches = config.data, config.model.num_patches
    workloads = expected_workloads(config, 3)
    samples = config.step_shares(3).rank_samples(0)
    images = samples.images + samples.pairs
    assert len(workloads) == 3 and sum(workload.images for workload in workloads) == images
    tokens = samples.pairs * data.pair_text_length + samples.texts * data.text_length
    assert sum(workload.tokens for workload in workloads) == tokens
    assert sum(workload.rows for workload in workloads) == tokens + images * (1 + patches)
    masked = sum(workload.masked_patches for workload in workloads)
    assert masked == images * round(patches * pretraining_config(config).image_mask_ratio)
