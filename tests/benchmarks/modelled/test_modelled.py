"""Tests the modelled times of ops and steps."""

from pathlib import Path

import pytest

from beit3_ds.benchmarks.modelled.block import BlockShape, block_times
from beit3_ds.benchmarks.modelled.rates import RATES
from beit3_ds.benchmarks.modelled.report import HOST, UNKNOWN, describe_modelled
from beit3_ds.benchmarks.modelled.step import step_time
from beit3_ds.config import load_run_config
from beit3_ds.model.flops import Work, layer_flops

CONFIGS = Path(__file__).parents[3] / "ds_configs"


@pytest.mark.parametrize("gpu", RATES)
@pytest.mark.parametrize("sub_layernorm", [False, True])
@pytest.mark.parametrize(("hidden", "ffn_hidden"), [(768, 3072), (1024, 4096), (1408, 6144)])
def test_no_op_is_slower_now(gpu: str, sub_layernorm: bool, hidden: int, ffn_hidden: int) -> None:
    """Checks that no op is slower than the old kernel: where the old kernel is fastest, it stays in use."""
    for rows in (2048, 16384, 150_000):
        shape = BlockShape(rows, rows * 197, hidden, ffn_hidden, sub_layernorm, attention_lengths=(0.8, 0.2))
        times = block_times(RATES[gpu], shape)
        assert all(0 <= op.now <= op.before * (1 + 1e-9) for op in times), times


@pytest.mark.parametrize(("name", "world_size", "least"), [("base_8gpu", 8, 2.0), ("giant_zero3_64gpu", 64, 1.25)])
def test_steps_are_faster_now(name: str, world_size: int, least: float) -> None:
    config = load_run_config(CONFIGS / f"{name}.json")
    step = step_time(config, world_size, RATES["h100-sxm"], HOST[config.model.hidden_size])
    total = step.total()
    assert total.before / total.now >= least
    assert step.flops / total.now < 0.73 * 989e12  # catches a step that is faster than its products


def test_operations_are_those_of_the_model() -> None:
    """Catches operations that leave out rows, experts or heads, which would make the MFU wrong."""
    config = load_run_config(CONFIGS / "base_8gpu.json")
    step, images = step_time(config, 8, RATES["h100-sxm"], HOST[768]), 256
    rows = images * (2 * 197 + 64 + 128)
    attended = images * (197**2 + 261**2 + 128**2)
    masked_patches, masked_tokens = 2 * images * 196 * 0.4, images * (64 * 0.5 + 128 * 0.15)
    head = 2 * 768 * (masked_patches * 8192 + masked_tokens * 64010)
    embeddings, *rest = layer_flops(config.model, Work(rows, attended, attended, 2 * images * 196, head))
    assert step.flops == pytest.approx(2 * embeddings + 3 * sum(rest))


def test_the_report_states_what_it_assumes() -> None:
    report = describe_modelled(CONFIGS)
    assert report.startswith("All times are *modelled*") and all(item in report for item in UNKNOWN)
    assert report.count("| block |") == 3 and report.count("| step |") == 2


def test_the_documented_report_is_the_commands() -> None:
    """Catches a table in BENCHMARKS.md that was computed by hand, or before the rates or the host's times changed."""
    assert describe_modelled(CONFIGS) in (CONFIGS.parent / "BENCHMARKS.md").read_text(encoding="utf-8")
