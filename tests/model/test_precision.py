"""Tests the float32 residual stream of a bf16 model: its dtype and precision, and no effect on other models."""

import pytest
import torch
from torch import Tensor, nn

from beit3_ds.benchmarks.precision import measure_precision
from beit3_ds.config import ModelConfig
from beit3_ds.model import BEiT3, initialize_parameters
from beit3_ds.tasks.pretraining.model import PretrainingModel
from tests.batches import decoupled, random_batch, small_model_config

FACTORS = torch.ones(4)


def build(config: ModelConfig, dtype: torch.dtype, *, wide: bool, checkpointing: str = "none") -> BEiT3:
    model = PretrainingModel(config, activation_checkpointing=checkpointing, fp32_residual_connection=wide)  # type: ignore[arg-type]
    initialize_parameters(model, config, seed=1)
    return model.to(dtype)


def streams(model: BEiT3) -> list[tuple[torch.dtype, torch.dtype]]:
    """Returns the dtypes of the stream and of its gradient, after the embeddings and after every block."""
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def watch(module: nn.Module, arguments: object, stream: Tensor) -> None:
        stream.register_hook(lambda gradient: seen.append((stream.dtype, gradient.dtype)))

    assert model.embeddings is not None
    hooks = [module.register_forward_hook(watch) for module in (model.embeddings, *model.blocks.values())]
    model(random_batch(model.config, 2, 2, 2, drop_path=True), FACTORS).total.backward()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    "config",
    [small_model_config(), decoupled(), small_model_config(final_norm=False)],
    ids=["shared", "decoupled", "no final norm"],
)
def test_the_option_sets_the_streams_dtype(config: ModelConfig, checkpointing: str) -> None:
    """Catches a block that rounds the stream or its gradient, and an option without effect."""
    for wide, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = build(config, torch.bfloat16, wide=wide, checkpointing=checkpointing)
        assert model.stream_dtype == dtype
        assert streams(model) == [(dtype, dtype)] * (1 + config.num_layers)
        assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {
            torch.bfloat16
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_models_are_the_same_either_way(dtype: torch.dtype) -> None:
    config, losses = small_model_config(), []
    for wide in (False, True):
        model = build(config, dtype, wide=wide)
        losses.append(model(random_batch(config, 2, 2, 2), FACTORS).total)
        assert model.stream_dtype == dtype
    assert torch.equal(*losses)


def test_gradients_are_nearer_to_float64() -> None:
    """Checks a deep narrow model: a float32 stream halves the error at least, and float32 sums do not increase it."""
    errors = {(row.stream, row.sums): row.error for row in measure_precision(num_layers=16, width=32, micro_batches=2)}
    assert errors["fp32", "fp32"] < 0.5 * errors["bf16", "fp32"]
    assert errors["fp32", "fp32"] <= errors["fp32", "bf16"]
