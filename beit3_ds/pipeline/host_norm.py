"""Copies DeepSpeed's gradient norm to the host as soon as it is computed, so that a step waits for the device only
once.

Without this module, DeepSpeed's optimizers wait for the device several times: to copy constants to the device, to check
the norm, and, without ZeRO, once per parameter. One of these waits begins after the optimizer's update is queued on the
device, and lasts until the update is done.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.fp16 import unfused_optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor


def keep_norm_on_host(engine: DeepSpeedEngine) -> None:
    """Makes the engine's optimizer read the gradient norm from the device once per step, and keep it on the host.

    Call this function after `deepspeed_compat.adapt_engine`, which replaces ZeRO-3's norm. Has no effect in float32
    without ZeRO, where `training.engine.apply_update` computes the norm. This function replaces some functions of
    DeepSpeed's modules, so the change affects the whole process.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        norms_of_groups = optimizer._get_norm_groups
        optimizer._get_norm_groups = lambda: [norm.cpu() for norm in norms_of_groups()]
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        global_norm = optimizer.scaled_global_norm
        stage_1_and_2.mask_nan_or_inf_with_val_inplace = _mark_non_finite
        optimizer.scaled_global_norm = lambda: global_norm().cpu()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        unfused_optimizer.get_weight_norm = _sum_of_squares
        unfused_optimizer.get_global_norm = _read_norm


def _mark_non_finite(norm: Tensor, device: Any = None) -> None:
    """Replaces a non-finite norm with -1 in place. DeepSpeed uses -1 for an invalid norm.

    DeepSpeed's own function copies the constant -1 to the device. This function copies nothing, so the host does not
    wait.
    """
    norm.masked_fill_(~norm.isfinite(), -1.0)


def _sum_of_squares(gradients: Sequence[Tensor], mpu: Any) -> Tensor:
    """Returns the sum of squares of a parameter group's gradients over all model-parallel ranks, a float32 scalar."""
    counted = [g for g in gradients if mpu.get_model_parallel_rank() == 0 or is_model_parallel_parameter(g)]
    norms = [gradient.float().norm().double() for gradient in counted]
    zero = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    total = torch.stack([zero, *norms]).square().sum().float()
    dist.all_reduce(total, group=mpu.get_model_parallel_group())
    return total


def _read_norm(norm_list: Sequence[Tensor | float]) -> float:
    """Returns the gradient norm over all parameter groups.

    Args:
        norm_list: result of `_sum_of_squares` for each parameter group, or 0.0 for a group without gradients.
    """
    groups = [total.double() for total in norm_list if isinstance(total, Tensor)]
    return float(torch.stack(groups).sum().sqrt())
