"""Tests that initial values depend only on seed and name, and follow the rule of BEiT or Magneto."""

import math

import pytest
import torch

from beit3_ds.model import initial_value, initialize_parameters
from beit3_ds.parallel import TensorParallel, logical_part, own_part
from beit3_ds.tasks.pretraining.model import PretrainingModel
from tests.batches import decoupled, small_model_config


def test_values_do_not_depend_on_the_order_of_construction() -> None:
    config = small_model_config()
    model = PretrainingModel(config)
    torch.manual_seed(0)
    initialize_parameters(model, config, seed=1)
    for name, parameter in reversed(list(model.named_parameters())):
        torch.manual_seed(99)  # the global generator must not matter
        assert torch.equal(parameter, initial_value(name, parameter.shape, config, seed=1)), name


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_hold_their_parts_of_the_same_values(rank: int) -> None:
    config = small_model_config(num_attention_heads=2, text_vocab_size=150)  # the second rank has padding rows
    whole, part = PretrainingModel(config), PretrainingModel(config, TensorParallel(rank=rank, size=2))
    for model in (whole, part):
        initialize_parameters(model, config, seed=1)
    for name, parameter in part.named_parameters():
        assert torch.equal(logical_part(parameter), own_part(parameter, whole.get_parameter(name))), name


def test_seed_and_name_matter() -> None:
    config, shape = small_model_config(), torch.Size([8, 8])
    one = initial_value("blocks.0.ffn.fc1.weight_vision", shape, config, 1)
    assert not torch.equal(one, initial_value("blocks.0.ffn.fc1.weight_vision", shape, config, 2))
    assert not torch.equal(one, initial_value("blocks.0.ffn.fc1.weight_language", shape, config, 1))


def test_beit_rule() -> None:
    config, shape = small_model_config(), torch.Size([400, 400])
    plain = initial_value("blocks.1.ffn.fc1.weight_vision", shape, config, 1)
    assert plain.abs().max() <= 0.02
    # A normal truncated at one standard deviation has 0.5396 of its standard deviation.
    assert math.isclose(plain.std().item(), 0.02 * 0.5396, rel_tol=0.02)
    for name in ("blocks.1.ffn.fc2.weight_vision", "blocks.1.attention.out_proj.weight_shared"):
        scaled = initial_value(name, shape, config, 1)
        assert math.isclose(scaled.std().item(), plain.std().item() / math.sqrt(4), rel_tol=0.02), name
    assert (initial_value("blocks.0.ffn.norm.weight_vision", torch.Size([4]), config, 1) == 1).all()
    assert (initial_value("heads.mlm.bias", torch.Size([4]), config, 1) == 0).all()


def test_embeddings_have_a_scale_of_their_own() -> None:
    config, shape = small_model_config(initial_embedding_std=0.4), torch.Size([64, 64])
    for name, parameter in PretrainingModel(config).named_parameters():
        if name.startswith("embeddings.") and "bias" not in name:
            value = initial_value(name, parameter.shape, config, 1)
            assert torch.allclose(value, 20 * initial_value(name, parameter.shape, small_model_config(), 1)), name
    for name in ("blocks.0.ffn.fc1.weight_vision", "heads.mlm.weight"):
        assert torch.equal(
            initial_value(name, shape, config, 1), initial_value(name, shape, small_model_config(), 1)
        ), name


def test_magneto_rule() -> None:
    config, shape = decoupled(), torch.Size([400, 400])
    xavier = math.sqrt(2 / 800)
    gain = math.sqrt(math.log(2 * config.num_layers))
    for name, factor in (("q_proj", 1.0), ("k_proj", 1.0), ("v_proj", gain), ("out_proj", gain)):
        value = initial_value(f"blocks.0.attention.{name}.weight_vision", shape, config, 1)
        assert math.isclose(value.std().item(), xavier * factor, rel_tol=0.02), name
