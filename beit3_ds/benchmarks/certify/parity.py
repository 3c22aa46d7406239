"""Compares a training step of a small model on a GPU with the same step in float64 on the CPU."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.benchmarks.step.batches import build_batch, step_config
from beit3_ds.config import ModelConfig
from beit3_ds.model import initialize_parameters
from beit3_ds.tasks.pretraining.model import PretrainingModel

_SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 176,  # heads of 88, as in giant
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


def check_parity(device: torch.device) -> list[dict[str, Any]]:
    """Compares the gradients on a device with float64, for each layout of the model and each dtype.

    A row passes if the error of the device's gradients is at most twice the CPU's error in the same dtype. In float32
    an error of at most 1e-4 of the gradients' norm passes too, because the CPU sums in another order and is sometimes
    more accurate by chance.

    Args:
        device: the device to compare.

    Returns:
        One row per layout and dtype: `layout`, `dtype`, `loss_error` in nats, `gradient_error` as a share of the norm
        of all gradients, both against float64, `allowed` (the largest `gradient_error` that passes), and `passed`.
    """
    rows = []
    for layout, changes in _LAYOUTS.items():
        run = step_config("tiny", **(_SIZES | changes))
        small = replace(run.model, text_vocab_size=2010, visual_vocab_size=512)  # float64 is slow
        run = replace(run, backbone=small)
        batch = build_batch(run, 0)
        exact_loss, exact = _step(run.model, batch, torch.device("cpu"), torch.float64)
        for dtype in _DTYPES:
            _, on_cpu = _step(run.model, batch, torch.device("cpu"), dtype)
            loss, gradient = _step(run.model, batch, device, dtype)
            error, allowed = _distance(gradient, exact), 2 * _distance(on_cpu, exact)
            allowed = max(allowed, _FLOAT32_ERROR) if dtype == torch.float32 else allowed
            rows.append(
                {
                    "layout": layout,
                    "dtype": str(dtype).removeprefix("torch."),
                    "loss_error": abs(loss - exact_loss),
                    "gradient_error": error,
                    "allowed": allowed,
                    "passed": error <= allowed,
                }
            )
    return rows


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


def main(json_path: str) -> int:
    """Prints the rows of `check_parity`, writes them to a JSON file, and returns 1 if one failed, otherwise 0."""
    rows = check_parity(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    Path(json_path).write_text(json.dumps(rows, indent=2), encoding="utf-8")
    for row in rows:
        print(
            ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{value}" for name, value in row.items())
        )
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
