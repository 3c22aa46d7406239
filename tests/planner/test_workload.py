"""Tests the modelled rows of a micro-batch for tasks that pack a sample as several pairs."""

from beit3_ds.config import load_run_config
from beit3_ds.planner import expected_workloads


def test_both_pairs_of_a_statement_count() -> None:
    """Catches a memory model that counts one image for a statement about two."""
    config = load_run_config("ds_configs/nlvr2_small_cpu.json")
    (workload,) = expected_workloads(config, 1)
    model, data = config.model, config.data
    pairs = 2 * data.pairs.samples_per_step
    assert workload.images == pairs
    assert workload.rows == pairs * (1 + model.num_patches + data.pair_text_length)
