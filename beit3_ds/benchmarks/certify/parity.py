"""Compares a training step of a small model on a GPU with the same step in float64 on the CPU."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.benchmarks.certify.recorder import Recorder
from beit3_ds.benchmarks.step.batches import build_batch, step_config
from beit3_ds.benchmarks.turns import device_of_turns
from beit3_ds.config import ModelConfig
from beit3_ds.model import initialize_parameters
from beit3_ds.tasks.pretraining.model import PretrainingModel

_SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 176,  # 88 columns per head, as in giant
    "ffn_hidden_size": 704,
    "num_attention_heads": 2,
}
_LAYOUTS: dict[str, dict[str, Any]] = {
    "shared": {"layout": "shared", "sub_layernorm": False, "num_vision_language_layers": 1},
    "shared, sub-LN": {"layout": "shared", "num_vision_language_layers": 1},
    "decoupled, sub-LN": {},
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT32_ERROR = 1e-4


def measure(recorder: Recorder) -> None:
    """Records the errors of loss and gradients relative to float64, for each model layout and dtype.

    A check passes if the gradient error on the device is at most twice the CPU's gradient error in the same dtype. In
    float32, the CPU's error can be small by chance. So an error of at most 1e-4 relative to the gradients' norm also
    passes.
    """
    device = device_of_turns()
    for layout, changes in _LAYOUTS.items():
        run = step_config("tiny", **(_SIZES | changes))
        small = replace(run.model, text_vocab_size=2010, visual_vocab_size=512)  # because float64 is slow
        run = replace(run, backbone=small)
        batch = build_batch(run, 0)
        exact = lru_cache(1)(partial(_step, run.model, batch, torch.device("cpu"), torch.float64))
        for dtype in _DTYPES:
            item = f"{layout}, {str(dtype).removeprefix('torch.')}"
            recorder.measure(item, partial(_compare, run.model, batch, device, dtype, exact))


def _compare(
    config: ModelConfig,
    batch: PackedBatch,
    device: torch.device,
    dtype: torch.dtype,
    compute_exact: Callable[[], tuple[float, torch.Tensor]],
) -> dict[str, Any]:
    """Computes a training step on a device, and returns the errors of its loss and gradients.

    Returns:
        `loss_error` in nats; `gradient_error`, relative to the gradients' norm; `allowed`, the limit for
        `gradient_error`; and `passed`.
    """
    exact_loss, exact = compute_exact()
    _, on_cpu = _step(config, batch, torch.device("cpu"), dtype)
    loss, gradient = _step(config, batch, device, dtype)
    error, allowed = _distance(gradient, exact), 2 * _distance(on_cpu, exact)
    allowed = max(allowed, _FLOAT32_ERROR) if dtype == torch.float32 else allowed
    loss_error = abs(loss - exact_loss)
    return {"loss_error": loss_error, "gradient_error": error, "allowed": allowed, "passed": error <= allowed}


def _step(
    config: ModelConfig, batch: PackedBatch, device: torch.device, dtype: torch.dtype
) -> tuple[float, torch.Tensor]:
    """Computes one training step; returns the loss, and all gradients as one float64 vector on the CPU."""
    model = PretrainingModel(config)
    initialize_parameters(model, config, seed=0)
    model.to(device, dtype)
    output = model(batch.to(device), torch.full((4,), 1e-2, device=device))
    output.total.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return output.total.item(), torch.cat([g.detach().double().cpu().flatten() for g in gradients if g is not None])


def _distance(gradient: torch.Tensor, exact: torch.Tensor) -> float:
    return float((gradient - exact).norm() / exact.norm())
