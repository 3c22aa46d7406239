"""Tests the initial values of the detection head."""

import math

from beit3_ds.config.dense import DenseConfig
from beit3_ds.model.initialization import parameter_generator
from beit3_ds.tasks.detection.config import DetectionConfig
from beit3_ds.tasks.detection.head import DetectionHead
from tests.batches import small_model_config


def _initial_stds(channels: int) -> dict[str, float]:
    config = small_model_config(
        hidden_size=256, num_attention_heads=4, inputs=("images",), dense=DenseConfig(window_size=2)
    )
    head = DetectionHead(config, DetectionConfig(pyramid_channels=channels, box_width=128), 20)
    values = {
        name: head.initial_value(name, parameter.shape, parameter_generator(1, name))
        for name, parameter in head.named_parameters()
    }
    return {name: value.std().item() for name, value in values.items() if value is not None}


def test_layers_start_as_in_vitdet() -> None:
    """Catches an initial standard deviation of 0.02 in every layer.

    With 0.02, updates are large compared with the weights, and a narrow head learns little.
    """
    stds = _initial_stds(64)
    expected = {
        "proposals.objectness": 0.01,
        "proposals.deltas": 0.01,
        "boxes.stages.2.classes": 0.01,
        "boxes.stages.2.deltas": 0.001,
        "boxes.stages.2.linear": 1 / math.sqrt(64 * 49),
        "boxes.stages.2.convs.3.conv": math.sqrt(2 / (64 * 9)),
        "proposals.convs.1": math.sqrt(2 / (64 * 9)),
        "masks.masks": 0.001,
        "masks.enlarge": math.sqrt(2 / (64 * 4)),
        "pyramid.maps.4.resampling.upsampling1": math.sqrt(2 / (128 * 4)),
        "pyramid.maps.16.lateral": math.sqrt(2 / 64),
    }
    for name, std in expected.items():
        assert math.isclose(stds[f"{name}.weight"], std, rel_tol=0.15), name


def test_norms_and_biases_keep_the_general_rule() -> None:
    assert not [name for name in _initial_stds(16) if "norm" in name or "bias" in name]
