"""What this project knows of DeepSpeed's own configuration: its top-level keys and the batch sizes it derives."""

from collections.abc import Mapping
from typing import Any

from beit3_ds.config.strict import ConfigError, check_known_keys

OWN_SECTION = "beit3_ds"
"""The key of this project's section in a DeepSpeed JSON file."""

DEEPSPEED_KEYS = frozenset(
    {
        *("activation_checkpointing", "aio", "amp", "autotuning", "bf16", "bfloat16", "checkpoint", "comet"),
        *("comms_logger", "communication_data_type", "compile", "compression_training", "csv_monitor"),
        *("curriculum_learning", "data_efficiency", "data_types", "dataloader_drop_last", "datastates_ckpt"),
        *("disable_allgather", "disable_python_gc", "dump_state", "eigenvalue", "elasticity", "expert_parallel"),
        *("flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping"),
        *("gradient_predivide_factor", "graph_harvesting", "hybrid_engine", "log_level"),
        *("managed_gradient_accumulation", "memory_breakdown", "nebula", "optimizer", "pipeline"),
        *("prescale_gradients", "progressive_layer_drop", "quantize_training", "scheduler"),
        *("seq_parallel_communication_data_type", "sparse_attention", "sparse_gradients", "steps_per_print"),
        *("tensor_parallel", "tensorboard", "timers", "torch_autocast", "train_batch_size"),
        *("train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "vocabulary_size", "wandb"),
        *("wall_clock_breakdown", "weight_quantization", "zero_allow_untested_optimizer"),
        *("zero_force_ds_cpu_optimizer", "zero_optimization"),
    }
)
"""Top-level keys that DeepSpeed 0.19.8 reads. DeepSpeed itself ignores a misspelt one without a word."""

_OURS_INSTEAD = {
    "optimizer": "beit3_ds.training (learning_rate, adam_betas, weight_decay, ...), which knows what must not decay",
    "scheduler": "beit3_ds.training (warmup_steps, total_steps, min_learning_rate)",
    "curriculum_learning": "nothing: the order of the data is a pure function of seed and step",
    "data_efficiency": "nothing: the order of the data is a pure function of seed and step",
    "progressive_layer_drop": "beit3_ds.model.drop_path_rate",
    "fp16": "bf16, or neither for fp32",
    "amp": "bf16, or neither for fp32",
}


def check_deepspeed_keys(mapping: Mapping[str, Any], where: str) -> None:
    """Refuses top-level keys that DeepSpeed does not know, and those whose work this project does itself.

    Raises:
        ConfigError: naming the key and the nearest valid one, or what to use instead.
    """
    check_known_keys(mapping, DEEPSPEED_KEYS | {OWN_SECTION}, where)
    for key, instead in _OURS_INSTEAD.items():
        if key in mapping:
            raise ConfigError(f"{where}: '{key}' is not used here. Use {instead}.")


def engine_config(mapping: Mapping[str, Any], samples_per_step: int, data_parallel_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`: the user's, with batch sizes for an engine that never accumulates.

    Micro-batches belong to this project's schedule, so the engine's accumulation is always 1. DeepSpeed asserts that
    its batch sizes are products of each other, which uneven shares are not: it is told the largest share alone, and
    uses it for figures in its own log only.
    """
    return {
        **{key: value for key, value in mapping.items() if key != "train_batch_size"},
        "train_micro_batch_size_per_gpu": -(-samples_per_step // data_parallel_size),
        "gradient_accumulation_steps": 1,
    }
