"""Tests the rule that sets the weight decay and learning rate of each parameter."""

import dataclasses
from typing import Any

import pytest

from beit3_ds.config import ConfigError, RunConfig
from beit3_ds.model.parameter_groups import (
    ParameterGroup,
    check_frozen,
    group_parameters,
    layer_number,
    parameter_group,
    split_groups,
)
from tests.run_config import small_run_config

NAMES = ("embeddings.cls_token", "embeddings.word.weight", "blocks.0.attention.q_proj.weight", "norm.weight_vision")
NAMES = (*NAMES, "blocks.1.ffn.fc2.bias_language", "heads.mlm.weight", "heads.mlm.bias")


def config(**training: Any) -> RunConfig:
    whole = small_run_config(0, num_layers=2)
    return dataclasses.replace(whole, training=dataclasses.replace(whole.training, **training))


def test_layers_are_numbered_as_in_the_reference() -> None:
    numbers = [layer_number(name, 2) for name in NAMES]
    assert numbers == [0, 0, 1, 3, 2, 3, 3]  # embeddings, block 0, final norm, block 1, head


def test_defaults_give_two_groups() -> None:
    groups = group_parameters({name: name for name in NAMES}, config())
    assert list(groups) == [ParameterGroup(0.05, 1.0), ParameterGroup(0.0, 1.0)]
    assert groups[ParameterGroup(0.05, 1.0)] == [NAMES[1], NAMES[2], NAMES[5]]


def test_rates_fall_layer_by_layer_and_the_head_has_its_own() -> None:
    fine_tuning = config(layer_decay=0.5, head_learning_rate_scale=20.0)
    scales = {name: parameter_group(name, fine_tuning).lr_scale for name in NAMES}
    assert list(scales.values()) == [0.125, 0.125, 0.25, 1.0, 0.5, 20.0, 20.0]
    # equal settings share a group: without weight decay one group per rate is left
    assert len(group_parameters(scales, dataclasses.replace(fine_tuning))) == 8 - 1
    assert len(group_parameters(scales, config(layer_decay=0.5, weight_decay=0.0))) == 4


def test_frozen_parameters_have_no_rate_and_no_decay() -> None:
    frozen = config(frozen=("embeddings.*", "*.bias_language"), layer_decay=0.5)
    found = [name for name in NAMES if parameter_group(name, frozen).is_frozen]
    assert found == [NAMES[0], NAMES[1], NAMES[4]]
    assert parameter_group(NAMES[1], frozen) == ParameterGroup(0.0, 0.0)


def test_patterns_that_match_nothing_or_everything_are_refused() -> None:
    check_frozen((), NAMES)
    check_frozen(("blocks.*",), NAMES)
    with pytest.raises(ConfigError, match=r"'block.\*' matches no parameter.*Modules: blocks.\*, embeddings.\*, heads"):
        check_frozen(("norm.*", "block.*"), NAMES)
    with pytest.raises(ConfigError, match="freezes every parameter"):
        check_frozen(("*",), NAMES)


def test_a_stage_with_too_few_parameters_is_refused() -> None:
    divided = list(group_parameters({name: name for name in NAMES}, config()).items())
    with pytest.raises(ConfigError, match=r"8 groups.*only 7 parameters.*Lower parallel\.pipeline_parallel_size"):
        split_groups(divided, 8)


def test_split_groups_change_no_settings() -> None:
    divided = list(group_parameters({name: name for name in NAMES}, config()).items())
    split = split_groups(divided, 4)
    assert len(split) == 4 and split_groups(divided, 2) == divided
    assert [(group, name) for group, names in split for name in names] == [
        (group, name) for group, names in divided for name in names
    ]
