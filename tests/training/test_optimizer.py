"""Tests that parameter groups with different rates, and frozen parameters, train equally in every layout."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.ranks import run_ranks
from tests.training.steps import (
    LEARNING_RATE,
    NUM_LAYERS,
    Deal,
    check,
    config_for,
    error_ratios,
    load_steps,
    measure_steps,
    plain_steps,
)

FINE_TUNING = {
    "layer_decay": 0.6,
    "head_learning_rate_scale": 3.0,
    "frozen": ["blocks.1.attention.*", "embeddings.image_position", "heads.mim.bias"],
}

ONE_RANK: Deal = [[[0, 1, 2, 3], [4, 5, 6, 7]]]
TWO_RANKS: Deal = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]

LAYOUTS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "data 2": ((0, 1, 2, 3), {}),
    "tensor 2": ((0, 1, 3), {"tensor_parallel_size": 2}),
    "pipeline 2": ((0, 1, 2, 3), {"pipeline_parallel_size": 2}),
}
"""ZeRO stages and keys of the section "parallel", per layout of two ranks."""


def plain_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Builds plain AdamW with one group per trainable parameter and the reference's learning rates."""
    groups = []
    for name, parameter in model.named_parameters():
        if re.match(r"blocks\.1\.attention\.|embeddings\.image_position$|heads\.mim\.bias$", name):
            parameter.requires_grad_(False)
            continue
        block = re.match(r"blocks\.(\d+)\.", name)
        layer = int(block[1]) + 1 if block else 0 if name.startswith("embeddings.") else NUM_LAYERS + 1
        rate = LEARNING_RATE * 0.6 ** (NUM_LAYERS + 1 - layer) * (3 if name.startswith("heads.") else 1)
        decay = 0.05 if parameter.dim() > 1 and not name.endswith("_position") else 0.0
        groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, foreach=False)


def measure(stages: tuple[int, ...], parallel: dict[str, Any], expected: Path) -> list[dict[str, float]]:
    """Returns the error ratios of each ZeRO stage on one rank of a layout."""
    from beit3_ds.runtime.process_group import init_process_group

    mesh = init_process_group(config_for(0, **parallel).parallel)
    deal = ONE_RANK if parallel else TWO_RANKS
    results = []
    for zero_stage in stages:
        found = measure_steps(config_for(zero_stage, training=FINE_TUNING, **parallel), mesh, [deal])
        results.append(error_ratios(found, load_steps(expected)))
    mesh.close()
    return results


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes the steps of plain AdamW in one process to a file; returns the path."""
    path = tmp_path_factory.mktemp("groups") / "expected.safetensors"
    save_file(plain_steps(config_for(0), plain_optimizer), path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_update_like_plain_adamw(layout: str, expected: Path) -> None:
    """Catches a wrong rate, frozen gradients in the norm, and stages that deadlock over groups of other stages."""
    stages, parallel = LAYOUTS[layout]
    for zero_stage, *ratios in zip(stages, *run_ranks(measure, 2, stages, parallel, expected), strict=True):
        check(ratios, load_steps(expected), f"{layout}, ZeRO-{zero_stage}")


def test_frozen_parameters_keep_their_values(expected: Path) -> None:
    tensors: dict[str, Tensor] = load_steps(expected)
    assert torch.equal(tensors["weight 0 heads.mim.bias"], tensors["weight 2 heads.mim.bias"])
    assert not torch.equal(tensors["weight 0 heads.mlm.bias"], tensors["weight 2 heads.mlm.bias"])
