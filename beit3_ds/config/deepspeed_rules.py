"""Rules between DeepSpeed's keys, and between them and the run's own keys."""

from collections.abc import Mapping
from typing import Any

from beit3_ds.config.parallel import ParallelConfig
from beit3_ds.config.strict import ConfigError
from beit3_ds.config.training import TrainingConfig


def check_deepspeed_rules(deepspeed: Mapping[str, Any], training: TrainingConfig, parallel: ParallelConfig) -> None:
    """Refuses combinations of keys that DeepSpeed refuses, or that give wrong gradients or state that cannot be saved.

    Args:
        deepspeed: DeepSpeed's keys of a run, each already checked.
        training: gives the optimizer.
        parallel: gives the layout.

    Raises:
        ConfigError: naming the key to leave out.
    """
    zero = deepspeed.get("zero_optimization", {})
    _check_types(deepspeed, zero)
    _check_offloading(zero)
    if training.optimizer == "apex_fused_adam":
        _check_apex(deepspeed, zero)
    if parallel.virtual_pipeline_parallel_size > 1:
        _check_interleaving(zero)


def is_offloaded(zero: Mapping[str, Any], section: str) -> bool:
    """Returns whether `offload_param` or `offload_optimizer` moves anything to the host."""
    return bool(zero.get(section, {}).get("device", "none") != "none")


def _check_types(deepspeed: Mapping[str, Any], zero: Mapping[str, Any]) -> None:
    weights = "bf16" if deepspeed.get("bf16", {}).get("enabled") else "fp32"
    sums = deepspeed.get("data_types", {}).get("grad_accum_dtype", weights)
    if weights == "fp32" and sums == "bf16":
        raise ConfigError(
            'data_types.grad_accum_dtype="bf16" would round gradients of float32 weights. Leave it out, or set '
            "bf16.enabled."
        )
    if sums != weights and not zero.get("stage", 0):
        raise ConfigError(
            f'data_types.grad_accum_dtype="{sums}" beside {weights} weights needs ZeRO. Set zero_optimization.stage to '
            "1, 2 or 3, or leave it out."
        )


def _check_offloading(zero: Mapping[str, Any]) -> None:
    stage = zero.get("stage", 0)
    if is_offloaded(zero, "offload_param") and stage != 3:
        raise ConfigError(
            f"zero_optimization.offload_param needs zero_optimization.stage=3, which divides parameters; it is {stage}."
        )
    if is_offloaded(zero, "offload_optimizer") and not stage:
        raise ConfigError(
            "zero_optimization.offload_optimizer needs zero_optimization.stage 1, 2 or 3; it is 0. Set one of them, or "
            "leave it out."
        )


def _check_apex(deepspeed: Mapping[str, Any], zero: Mapping[str, Any]) -> None:
    if is_offloaded(zero, "offload_optimizer"):
        raise ConfigError(
            'training.optimizer="apex_fused_adam" runs on GPUs only, but zero_optimization.offload_optimizer updates '
            "on the host. Leave one of the two out."
        )
    if zero.get("stage", 0) == 3:
        raise ConfigError(
            'training.optimizer="apex_fused_adam" counts updates by parameter group, but zero_optimization.stage=3 '
            "updates a group in pieces, each of which would count. Use stage 1 or 2."
        )
    if deepspeed.get("bf16", {}).get("enabled") and not zero.get("stage", 0):
        raise ConfigError(
            'training.optimizer="apex_fused_adam" with bf16 and without ZeRO makes DeepSpeed keep state in a form that '
            "checkpoints do not read. Use zero_optimization.stage 1 or 2."
        )


def _check_interleaving(zero: Mapping[str, Any]) -> None:
    if zero.get("stage", 0) == 1 and zero.get("overlap_comm"):
        raise ConfigError(
            "zero_optimization.overlap_comm=true under stage 1 reduces the gradients of a step's last backward pass "
            "alone, which with parallel.virtual_pipeline_parallel_size > 1 goes through some of a stage's layers. "
            "Leave it out, or use ZeRO stage 0, 2 or 3."
        )
    if is_offloaded(zero, "offload_optimizer"):
        raise ConfigError(
            "zero_optimization.offload_optimizer takes the gradients of a step's last backward pass alone, which with "
            "parallel.virtual_pipeline_parallel_size > 1 goes through some of a stage's layers. Leave one of the two "
            "out."
        )
