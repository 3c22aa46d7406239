"""Tests how DeepSpeed's keys are interpreted when they are given or left out."""

from typing import Any

import pytest

from beit3_ds.config.deepspeed_options import DeepSpeedOptions


def test_defaults_are_float32_without_zero() -> None:
    options = DeepSpeedOptions({})
    assert (options.zero_stage, options.precision, options.is_bf16) == (0, "fp32", False)
    assert (options.grad_accum_dtype, options.communication_data_type) == ("fp32", "fp32")
    assert not options.offloads_parameters and not options.offloads_optimizer


@pytest.mark.parametrize(
    ("keys", "types"),
    [
        ({"bf16": {"enabled": True}}, ("bf16", "bf16", "bf16")),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, ("bf16", "fp32", "bf16")),
        ({"bf16": {"enabled": True}, "communication_data_type": "fp32"}, ("bf16", "bf16", "fp32")),
        ({"bf16": {"enabled": False}, "communication_data_type": "bf16"}, ("fp32", "fp32", "bf16")),
    ],
)
def test_types_follow_the_parameters_unless_given(keys: dict[str, Any], types: tuple[str, str, str]) -> None:
    options = DeepSpeedOptions(keys)
    assert (options.precision, options.grad_accum_dtype, options.communication_data_type) == types


def test_offloading_needs_a_device() -> None:
    section = {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "none"}}
    options = DeepSpeedOptions({"zero_optimization": section})
    assert options.zero_stage == 3 and options.zero == section
    assert options.offloads_parameters and not options.offloads_optimizer
