"""Builds AdamW with one parameter group per combination of weight decay and learning rate (paper, section 2.3)."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from beit3_ds.config import ConfigError, RunConfig, TrainingConfig
from beit3_ds.model.parameter_groups import group_parameters, parameter_group, split_groups


def check_optimizer(config: TrainingConfig) -> None:
    """Checks that the configured optimizer is installed.

    Raises:
        ConfigError: if the optimizer is not installed; the message names the package to install.
    """
    if config.optimizer == "apex_fused_adam":
        _find_fused_adam()


def _find_fused_adam() -> Any:
    return find_apex("optimizers", 'training.optimizer="apex_fused_adam"').FusedAdam


def find_apex(part: str, asked_for: str) -> Any:
    """Imports and returns a submodule of NVIDIA Apex.

    Args:
        part: name of the submodule.
        asked_for: setting that needs Apex, for the error message.

    Raises:
        ConfigError: if Apex is not installed, or the installed package is PyPI's unrelated `apex`.
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
    """Allocates AdamW's moments as zeros before the first update, which reduces memory fragmentation.

    By default, AdamW allocates the moments during the first update, in memory that activations used before. The
    activations of the next step would then need new memory.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # Fused AdamW needs the count on the device.
            count = torch.zeros((), dtype=torch.float32, device=parameter.device)
            zeros = {kind: torch.zeros_like(parameter, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": count, **zeros}


def build_optimizer(model: nn.Module, config: RunConfig, largest: Callable[[int], int] = int) -> torch.optim.Optimizer:
    """Builds AdamW with one parameter group per combination of weight decay and learning rate (`parameter_group`).

    Each group has a key `lr_scale`, a factor on the learning rate (`set_learning_rate`). The optimizer is PyTorch's
    fused AdamW unless `training.optimizer` selects Apex. Fused AdamW is ten times as fast as PyTorch's other
    implementation, even on a CPU.

    Args:
        model: this rank's part of the model.
        config: the run's configuration.
        largest: function that returns the maximum of a number over all pipeline stages. All stages need the same number
            of groups, because DeepSpeed sums the gradient norm over the stages group by group.

    Raises:
        ConfigError: if the configured optimizer is not installed.
    """
    training = config.training
    divided = list(group_parameters(dict(model.named_parameters()), config).items())
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": group.weight_decay, "lr_scale": group.lr_scale}
        for group, parameters in split_groups(divided, largest(len(divided)))
    ]
    recipe: dict[str, Any] = {"lr": training.learning_rate, "betas": training.adam_betas, "eps": training.adam_epsilon}
    if training.optimizer == "apex_fused_adam":
        optimizer: torch.optim.Optimizer = _find_fused_adam()(groups, **recipe)
    else:
        optimizer = torch.optim.AdamW(groups, **recipe, fused=True)
    set_learning_rate(optimizer, training.learning_rate)
    return optimizer


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Sets the learning rate of each parameter group to `rate` times the group's `lr_scale`.

    Args:
        optimizer: optimizer from `build_optimizer`, or DeepSpeed's wrapper around it.
        rate: learning rate of the schedule.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def freeze_parameters(model: nn.Module, config: RunConfig) -> None:
    """Registers hooks that set the gradients of frozen parameters to zero in every backward pass.

    Frozen parameters then do not affect the gradient norm and the moments. They stay in the optimizer, with learning
    rate 0. All ZeRO stages and layouts therefore partition, save and load them like other parameters. Call this
    function after all other gradient hooks are registered, because hooks run in the order of registration.
    """
    for name, parameter in model.named_parameters():
        if parameter_group(name, config).is_frozen:
            parameter.register_hook(torch.zeros_like)
