"""Measures the error of bf16 gradients, with the residual stream and the gradient sums in bf16 or float32.

The report has one row per combination of the stream's dtype and the sums' dtype. The error is the 2-norm of the
difference to float64 gradients, relative to the norm of the float64 gradients. The bf16 and float64 gradients are
computed with the same weights.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.benchmarks.step.batches import build_batch, step_config
from beit3_ds.config import ModelConfig, RunConfig
from beit3_ds.model import initialize_parameters
from beit3_ds.tasks.pretraining.model import PretrainingModel

_PATHS = tuple((stream, sums) for stream in ("bf16", "fp32") for sums in ("bf16", "fp32"))


class GradientError(NamedTuple):
    """Holds the gradient error for one combination of dtypes."""

    stream: str
    """dtype of the residual stream: "bf16" or "fp32"."""
    sums: str
    """dtype of the sums of gradients over micro-batches: "bf16" or "fp32"."""
    error: float
    """2-norm of the difference to the float64 gradients, relative to the norm of the float64 gradients."""


def benchmark_precision(num_layers: int, width: int, micro_batches: int) -> str:
    """Measures the gradient error for four combinations of dtypes, and returns a table.

    The residual stream is either bf16 or float32, and the gradient sums are either bf16 or float32.

    Args:
        num_layers: number of blocks of the model.
        width: hidden size of the model; the FFN is four times as wide.
        micro_batches: micro-batches per step, each with one image, one pair and one text.
    """
    rows = measure_precision(num_layers, width, micro_batches)
    title = f"gradient error against float64: {num_layers} layers of width {width}, {micro_batches} micro-batches"
    lines = [f"  residual stream {row.stream}, sums {row.sums}: {row.error:.2%}" for row in rows]
    return "\n".join([title, *lines])


def measure_precision(num_layers: int, width: int, micro_batches: int) -> list[GradientError]:
    """Measures the gradient error on the CPU for four combinations of dtypes.

    The residual stream is either bf16 or float32, and the gradient sums are either bf16 or float32. All combinations
    use the same weights and batches.
    """
    config = _narrow_config(num_layers, width)
    weights = PretrainingModel(config.model)
    initialize_parameters(weights, config.model, seed=1)
    state = {name: value.bfloat16() for name, value in weights.state_dict().items()}
    models = {"truth": _build(config.model, state, torch.float64, wide=False)}
    models |= {
        stream: _build(config.model, state, torch.bfloat16, wide=stream == "fp32") for stream in ("bf16", "fp32")
    }
    truth: list[Tensor] = []
    sums: dict[tuple[str, str], list[Tensor]] = {path: [] for path in _PATHS}
    for batch in _batches(config, micro_batches):
        truth = _add(truth, _gradients(models["truth"], batch, micro_batches), torch.float64)
        for stream in ("bf16", "fp32"):
            gradients = _gradients(models[stream], batch, micro_batches)
            for kind, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
                sums[stream, kind] = _add(sums[stream, kind], gradients, dtype)
    return [GradientError(*path, _distance(sums[path], truth)) for path in _PATHS]


def _narrow_config(num_layers: int, width: int) -> RunConfig:
    config = step_config("tiny", samples=1)
    model = ModelConfig(
        num_layers=num_layers,
        hidden_size=width,
        ffn_hidden_size=4 * width,
        num_attention_heads=4,
        patch_size=16,
        image_size=64,
        text_vocab_size=512,
        visual_vocab_size=256,
    )
    data = dataclasses.replace(config.data, text_length=32, pair_text_length=16)
    return dataclasses.replace(config, backbone=model, data=data)


def _build(model: ModelConfig, state: dict[str, Tensor], dtype: torch.dtype, *, wide: bool) -> PretrainingModel:
    built = PretrainingModel(model, fp32_residual_connection=wide).to(dtype)
    built.load_state_dict(state)
    return built


def _batches(config: RunConfig, number: int) -> Iterator[PackedBatch]:
    for index in range(number):
        batch = build_batch(config, index)
        assert batch.pixels is not None
        yield dataclasses.replace(batch, pixels=batch.pixels.bfloat16())


def _gradients(model: PretrainingModel, batch: PackedBatch, micro_batches: int) -> list[Tensor]:
    factors = torch.tensor([1 / max(1, count) for count in batch.term_counts]) / micro_batches
    return list(torch.autograd.grad(model(batch, factors).total, list(model.parameters())))


def _add(sums: list[Tensor], gradients: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    if not sums:
        return [gradient.to(dtype) for gradient in gradients]
    return [(total + gradient.to(dtype)) for total, gradient in zip(sums, gradients, strict=True)]


def _distance(found: list[Tensor], truth: list[Tensor]) -> float:
    error = sum(float((own.double() - exact).square().sum()) for own, exact in zip(found, truth, strict=True))
    return float((error / sum(float(exact.square().sum()) for exact in truth)) ** 0.5)
