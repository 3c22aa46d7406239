"""AdamW and what it decays (paper section 2.3)."""

import importlib
import importlib.util
import re
from typing import Any

import torch
from torch import nn

from beit3_ds.config import ConfigError, TrainingConfig

_NO_DECAY = re.compile(r"(^|[._])(bias|norm|cls_token|mask_token|image_position|text_position)([._]|$)")


def decays(name: str) -> bool:
    """Whether weight decay applies: to matrices, convolution and word table; not to biases, norms, tokens, positions.

    The rule reads names, not shapes, because under ZeRO-3 a parameter's shape is gone once it is partitioned.
    """
    return not _NO_DECAY.search(name)


def check_optimizer(config: TrainingConfig) -> None:
    """Refuses an optimizer that is not installed.

    Raises:
        ConfigError: with what to install.
    """
    if config.optimizer == "apex_fused_adam":
        _find_fused_adam()


def _find_fused_adam() -> Any:
    return find_apex("optimizers", 'training.optimizer="apex_fused_adam"').FusedAdam


def find_apex(part: str, asked_for: str) -> Any:
    """Imports a part of NVIDIA's apex.

    Args:
        part: the name of the submodule.
        asked_for: who needs it, for the error.

    Raises:
        ConfigError: if apex is absent, or is the unrelated package of that name on PyPI.
    """
    try:
        return importlib.import_module(f"apex.{part}")
    except ImportError as error:
        found = "is another package, or lacks its CUDA extensions" if importlib.util.find_spec("apex") else "is absent"
        raise ConfigError(
            f"{asked_for} needs NVIDIA's apex, which {found} ({error}). PyPI's `apex` is an unrelated package: build "
            "apex from github.com/NVIDIA/apex with its CUDA extensions, or leave the setting out."
        ) from None


def allocate_moments(optimizer: torch.optim.AdamW) -> None:
    """Makes AdamW's moments before the first update, zeros as it would make them itself.

    What stays then lies below what comes and goes with a step. Made in the first update, moments would fill the gaps
    between its activations, and the next step's would need new memory.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # The fused form wants the count on the device.
            count = torch.zeros((), dtype=torch.float32, device=parameter.device)
            zeros = {kind: torch.zeros_like(parameter, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": count, **zeros}


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Builds AdamW with two parameter groups.

    Torch's fused form is ten times faster than its plain one on the CPU too.

    Raises:
        ConfigError: see `check_optimizer`.
    """
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if decays(name)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if not decays(name)], "weight_decay": 0.0},
    ]
    recipe: dict[str, Any] = {"lr": config.learning_rate, "betas": config.adam_betas, "eps": config.adam_epsilon}
    if config.optimizer == "apex_fused_adam":
        optimizer: torch.optim.Optimizer = _find_fused_adam()(groups, **recipe)
        return optimizer
    return torch.optim.AdamW(groups, **recipe, fused=True)
