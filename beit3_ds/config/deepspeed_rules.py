"""Checks which DeepSpeed keys may be combined with each other, with the optimizer and with the parallel layout."""

from beit3_ds.config.deepspeed_options import DeepSpeedOptions
from beit3_ds.config.parallel import ParallelConfig
from beit3_ds.config.strict import ConfigError
from beit3_ds.config.training import TrainingConfig


def check_deepspeed_rules(options: DeepSpeedOptions, training: TrainingConfig, parallel: ParallelConfig) -> None:
    """Checks that the DeepSpeed options work with each other, with the optimizer and with the layout.

    A combination is invalid if DeepSpeed refuses it, if gradients would be wrong, or if checkpoints could not save the
    optimizer state.

    Args:
        options: the run's DeepSpeed options.
        training: the section "training", which names the optimizer.
        parallel: the section "parallel", which gives the layout.

    Raises:
        ConfigError: if a combination is invalid; the message names the keys to change.
    """
    _check_types(options)
    _check_offloading(options)
    if training.optimizer == "apex_fused_adam":
        _check_apex(options)
    if parallel.virtual_pipeline_parallel_size > 1:
        _check_interleaving(options)


def _check_types(options: DeepSpeedOptions) -> None:
    weights, sums = options.precision, options.grad_accum_dtype
    if weights == "fp32" and sums == "bf16":
        raise ConfigError(
            'data_types.grad_accum_dtype="bf16" would round gradients of float32 weights. Leave it out, or set '
            "bf16.enabled."
        )
    if sums != weights and not options.zero_stage:
        raise ConfigError(
            f'data_types.grad_accum_dtype="{sums}" with {weights} weights needs ZeRO. Set zero_optimization.stage to '
            "1, 2 or 3, or leave out grad_accum_dtype."
        )


def _check_offloading(options: DeepSpeedOptions) -> None:
    stage = options.zero_stage
    if options.offloads_parameters and stage != 3:
        raise ConfigError(
            f"zero_optimization.offload_param needs zero_optimization.stage=3, which divides parameters; it is {stage}."
        )
    if options.offloads_optimizer and not stage:
        raise ConfigError(
            "zero_optimization.offload_optimizer needs zero_optimization.stage 1, 2 or 3; the stage is 0. Set one of "
            "these stages, or leave out offload_optimizer."
        )


def _check_apex(options: DeepSpeedOptions) -> None:
    if options.offloads_optimizer:
        raise ConfigError(
            'training.optimizer="apex_fused_adam" runs on GPUs only, but zero_optimization.offload_optimizer updates '
            "on the host. Leave one of the two out."
        )
    if options.zero_stage == 3:
        raise ConfigError(
            'training.optimizer="apex_fused_adam" counts updates by parameter group, but zero_optimization.stage=3 '
            "updates a group in pieces and would count each piece. Use stage 1 or 2."
        )
    if options.is_bf16 and not options.zero_stage:
        raise ConfigError(
            'training.optimizer="apex_fused_adam" with bf16 and without ZeRO makes DeepSpeed keep state in a form that '
            "checkpoints cannot read. Use zero_optimization.stage 1 or 2."
        )


def _check_interleaving(options: DeepSpeedOptions) -> None:
    if options.zero_stage == 1 and options.zero.get("overlap_comm"):
        raise ConfigError(
            "zero_optimization.overlap_comm=true under stage 1 reduces only the gradients of a step's last backward "
            "pass. With parallel.virtual_pipeline_parallel_size > 1, that pass covers only some layers of a stage. "
            "Leave out overlap_comm, or use ZeRO stage 0, 2 or 3."
        )
    if options.offloads_optimizer:
        raise ConfigError(
            "zero_optimization.offload_optimizer takes only the gradients of a step's last backward pass. With "
            "parallel.virtual_pipeline_parallel_size > 1, that pass covers only some layers of a stage. Leave one of "
            "the two out."
        )
