"""Tests the error for a layout that does not fit: it states the rule and suggests the nearest valid layouts."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.config import ConfigError, RunConfig, build_run_config, check_layout
from beit3_ds.config.layouts import nearest_layouts
from tests.run_config import small_run_mapping


def config(accumulation: int = 4, zero: dict[str, Any] | None = None, **parallel: Any) -> RunConfig:
    mapping = small_run_mapping(0, samples=(16, 16, 16), accumulation=accumulation, num_attention_heads=4)
    mapping["zero_optimization"] = zero or {"stage": 0}
    mapping["beit3_ds"]["parallel"] = parallel
    return build_run_config(mapping)


@pytest.mark.parametrize(
    ("world_size", "accumulation", "parallel", "rule"),
    [
        (6, 4, {"tensor_parallel_size": 4}, r"tensor_parallel_size=4 x .* = 4 does not divide world_size=6"),
        (3, 4, {"tensor_parallel_size": 3}, r"tensor_parallel_size=3 does not divide model.num_attention_heads=4"),
        (8, 8, {"pipeline_parallel_size": 8}, r"pipeline_parallel_size=8 .* exceeds the 4 layers .* At most 4 stages"),
        (2, 1, {"pipeline_parallel_size": 2}, r"gradient_accumulation_steps=1 gives fewer micro-batches than .*=2"),
        (
            2,
            3,
            {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2},
            r"=3 is no multiple of .*=2, which interleaving needs. The nearest that fit: 2 or 4",
        ),
        (49, 4, {}, r"48 samples per step are fewer than the 49 data-parallel ranks.* at most 48 data-parallel ranks"),
    ],
)
def test_misfit_names_the_rule(world_size: int, accumulation: int, parallel: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_layout(config(accumulation, **parallel), world_size)
    message = str(caught.value)
    assert re.search(rule, message), message
    assert re.search(r"(Nearest layouts of|No layout of) \d+ ranks", message) and "\n" not in message


def test_nearest_layouts_are_named() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size=2, pipeline_parallel_size=2, gradient_accumulation"):
        check_layout(config(1, tensor_parallel_size=2, pipeline_parallel_size=2), 8)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 4), st.integers(1, 4))
def test_suggestions_fit(world_size: int, accumulation: int, tensor: int, stages: int) -> None:
    """Catches suggestions that are invalid; for a valid layout, the first suggestion is the layout itself."""
    asked = config(accumulation, tensor_parallel_size=tensor, pipeline_parallel_size=stages)
    near = nearest_layouts(asked, world_size)
    for layout in near:
        check_layout(layout, world_size)
    try:
        check_layout(asked, world_size)
    except ConfigError:
        return
    assert near[0] == asked


def test_interleaving_without_stages_is_refused() -> None:
    with pytest.raises(ConfigError, match="virtual_pipeline_parallel_size=2 interleaves"):
        config(virtual_pipeline_parallel_size=2)


@pytest.mark.parametrize(
    "zero", [{"stage": 1, "overlap_comm": True}, {"stage": 3, "offload_optimizer": {"device": "cpu"}}]
)
def test_what_deepspeed_gets_wrong_when_interleaved_is_refused(zero: dict[str, Any]) -> None:
    interleaved = {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2}
    with pytest.raises(ConfigError, match="only the gradients of a step's last backward pass"):
        check_layout(config(zero=zero, **interleaved), 2)
    check_layout(config(zero=zero, pipeline_parallel_size=2), 2)


@pytest.mark.parametrize("section", ["offload_optimizer", "offload_param"])
def test_state_that_cannot_be_saved_is_refused(section: str) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.device: expected .* \(.*NVMe files\), got str \'nvme\'"):
        config(zero={"stage": 3, section: {"device": "nvme"}})


def test_steps_without_a_gradient_norm_are_refused() -> None:
    """Catches a run without gradient norms, because only the norm shows that a step has a NaN."""
    with pytest.raises(ConfigError, match=r"compute_grad_norm: .* the gradient norm reveals steps with a NaN"):
        config(zero={"stage": 2, "compute_grad_norm": False})
