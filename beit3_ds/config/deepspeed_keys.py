"""Lists every key of DeepSpeed 0.19.8's configuration, with its accepted values or the reason for refusing it.

Keys that have no effect in this project are refused. Rules that involve several keys are in `deepspeed_rules`.

A key that may change the training state has test values (`Spec.samples`). For each value,
tests/checkpoint/test_deepspeed_keys.py trains, saves, exports, loads and resumes.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from beit3_ds.config.deepspeed_options import DeepSpeedOptions
from beit3_ds.config.key_specs import Choice, Fixed, Flag, Number, Refused, Section, Spec, Text
from beit3_ds.config.numbers import Range
from beit3_ds.config.zero_keys import NVME, OWN_CHECKPOINTS, REMOVED, ZERO

_NO_EFFECT = "the key has no effect in this project. Leave it out."
_OWN_DATA = "only the seed and the step number determine the order of the data. Leave it out."
_OWN_MODEL = "the feature replaces modules of models that DeepSpeed knows. Leave it out."

_BF16 = Section(
    example='{"enabled": true}',
    keys={
        "enabled": Flag(effect="Parameters and activations are bf16; AdamW keeps float32 copies of the weights."),
        "check_grad_overflow": Fixed(value=True, reason="the gradient norm decides whether a step is skipped."),
        "immediate_grad_update": Fixed(value=False, reason="gradients would be summed in another order."),
        "bf16_master_weights_and_grads": Fixed(value=False, reason="checkpoints keep weights in float32."),
        "bf16_optimizer_states": Fixed(value=False, reason="checkpoints keep moments in float32."),
    },
)

_DATA_TYPES = Section(
    example='{"grad_accum_dtype": "fp32"}',
    keys={
        "grad_accum_dtype": Choice(
            values=("fp32", "bf16"),
            samples=("fp32", "bf16"),
            effect="Dtype of the sums of micro-batch gradients; by default the dtype of the weights.",
        ),
        "param_dtype": Refused(reason="bf16.enabled sets it. Leave it out."),
        "buffer_dtype": Refused(reason="the model has no buffers. Leave it out."),
        "keep_in_fp32_modules": Refused(reason="the model has no buffers. Leave it out."),
    },
)


def _file_monitor(package: str) -> Section:
    return Section(
        example='{"enabled": true}',
        keys={
            "enabled": Flag(effect=f"Also writes the metrics in metrics.jsonl to {package}."),
            "output_path": Text(
                is_inner_path=True,
                effect="Folder for the files, inside training.output_dir; by default `logs`.",
            ),
            "job_name": Text(is_folder_name=True, effect="Folder below output_path."),
        },
    )


_WANDB = Section(
    example='{"enabled": true, "project": "beit3"}',
    keys={
        "enabled": Flag(samples=(False,), effect="Sends the metrics in metrics.jsonl to Weights & Biases."),
        "group": Text(effect="Name of the group of runs."),
        "team": Text(effect="Team that owns the project."),
        "project": Text(effect="Name of the project."),
    },
)

_COMMS_LOGGER = Section(
    example='{"enabled": true, "verbose": true}',
    keys={
        "enabled": Flag(effect="DeepSpeed logs its collectives."),
        "verbose": Flag(effect="DeepSpeed logs each collective when it ends."),
        "prof_all": Flag(effect="DeepSpeed logs all collectives, not only those in prof_ops."),
        "debug": Flag(effect="DeepSpeed also logs the caller."),
        "prof_ops": Refused(reason="lists of collectives are not supported. Use prof_all, which logs all of them."),
    },
)

_TIMERS = Section(
    example='{"throughput": {"enabled": false}}',
    keys={
        "throughput": Section(
            example='{"enabled": false}',
            keys={
                "enabled": Flag(effect="DeepSpeed times steps for its own log lines."),
                "synchronized": Flag(effect="DeepSpeed synchronises the device before it reads the times."),
            },
        )
    },
)

DEEPSPEED_KEYS: Mapping[str, Spec | Refused | Section] = {
    "train_batch_size": Number(
        range=Range(1),
        effect="Samples per step. Optional; if given, it must be the sum of samples_per_step of all kinds.",
    ),
    "train_micro_batch_size_per_gpu": Number(
        range=Range(1),
        effect="Samples per micro-batch. Optional; if given, it must be the value computed from samples_per_step.",
    ),
    "gradient_accumulation_steps": Number(
        range=Range(1, 2**20), samples=(1, 2), effect="Micro-batches per rank in each step."
    ),
    "gradient_clipping": Number(
        range=Range(0, 1e6, above=True),
        whole=False,
        samples=(0.05, 3.0),
        effect="Largest joint norm of all gradients; by default, gradients are not clipped.",
    ),
    "steps_per_print": Number(
        range=Range(1), samples=(1, 1_000_000), effect="Steps between DeepSpeed's own log lines."
    ),
    "zero_optimization": ZERO,
    "bf16": _BF16,
    "data_types": _DATA_TYPES,
    "communication_data_type": Choice(
        values=("fp32", "bf16"), samples=("fp32", "bf16"), effect="Dtype in which gradients are sent."
    ),
    "csv_monitor": _file_monitor("CSV files"),
    "tensorboard": _file_monitor("TensorBoard"),
    "wandb": _WANDB,
    "comms_logger": _COMMS_LOGGER,
    "timers": _TIMERS,
    "dump_state": Flag(effect="DeepSpeed prints its configuration at the start."),
    "memory_breakdown": Flag(effect="DeepSpeed logs memory before and after each pass."),
    "wall_clock_breakdown": Flag(effect="DeepSpeed logs the time of each pass."),
    "log_level": Choice(
        values=("debug", "info", "warning", "error", "critical"),
        samples=("warning", "error"),
        effect="Level of DeepSpeed's own log lines.",
    ),
    "managed_gradient_accumulation": Fixed(
        value=True, reason="the micro-batch schedule decides when the engine reduces gradients."
    ),
    "gradient_allreduce_op": Fixed(value="mean", reason="the loss is scaled for a mean over the data-parallel ranks."),
    "prescale_gradients": Fixed(value=False, reason="the key protects fp16 sums, and fp16 is not used."),
    "gradient_predivide_factor": Fixed(value=1.0, reason="the key protects fp16 sums, and fp16 is not used."),
    "zero_force_ds_cpu_optimizer": Fixed(
        value=False, reason="the optimizer is torch's AdamW; with offload_optimizer, this project sets the key."
    ),
    "disable_python_gc": Fixed(value=False, reason="Python would then free no memory in reference cycles."),
    "fp16": Refused(reason="loss scaling is not implemented. Use bf16, or neither for fp32."),
    "bfloat16": Refused(reason='bfloat16 is the old name. Write "bf16".'),
    "torch_autocast": Refused(reason='the kernels choose their dtypes themselves. Use "bf16": {"enabled": true}.'),
    "optimizer": Refused(
        reason="use beit3_ds.training (learning_rate, weight_decay, ...), which decays only some parameters."
    ),
    "scheduler": Refused(reason="use beit3_ds.training (warmup_steps, total_steps, min_learning_rate)."),
    "activation_checkpointing": Refused(reason='use beit3_ds.training.activation_checkpointing: "none" or "full".'),
    "tensor_parallel": Refused(reason="use beit3_ds.parallel.tensor_parallel_size."),
    "pipeline": Refused(reason="use beit3_ds.parallel.pipeline_parallel_size."),
    "comet": Refused(reason="this monitor was never tested here. Use csv_monitor, tensorboard or wandb."),
    "flops_profiler": Refused(
        reason="the profiler does not count operations in kernels. Progress lines and metrics.jsonl have FLOP/s."
    ),
    "autotuning": Refused(
        reason="autotuning would start other runs. `beit3 check` prints memory and traffic of a layout."
    ),
    "data_efficiency": Refused(reason=_OWN_DATA),
    "curriculum_learning": Refused(reason=_OWN_DATA),
    "dataloader_drop_last": Refused(reason=_OWN_DATA),
    "checkpoint": Refused(reason=OWN_CHECKPOINTS),
    "datastates_ckpt": Refused(reason=OWN_CHECKPOINTS),
    "nebula": Refused(reason=REMOVED),
    "hybrid_engine": Refused(reason=_OWN_MODEL),
    "expert_parallel": Refused(reason=_OWN_MODEL),
    "use_data_before_expert_parallelism": Refused(reason=_OWN_MODEL),
    "weight_quantization": Refused(reason=_OWN_MODEL),
    "compile": Refused(
        reason="the model's kernels are already compiled, and DeepCompile was never tested here. Leave it out."
    ),
    "aio": Refused(reason=NVME),
    "amp": Refused(reason="DeepSpeed 0.19 removed it. Use bf16, or neither for fp32."),
    "progressive_layer_drop": Refused(reason="DeepSpeed 0.19 removed it. Use beit3_ds.model.drop_path_rate."),
    **dict.fromkeys(
        (
            "compression_training",
            "eigenvalue",
            "elasticity",
            "graph_harvesting",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
        ),
        Refused(reason=REMOVED),
    ),
    **dict.fromkeys(
        (
            "disable_allgather",
            "seq_parallel_communication_data_type",
            "vocabulary_size",
            "zero_allow_untested_optimizer",
        ),
        Refused(reason=_NO_EFFECT),
    ),
}
"""Maps each top-level DeepSpeed key to its accepted values or the reason for refusing it."""


class AcceptedKey(NamedTuple):
    """Describes one accepted DeepSpeed key: where it is in the file, and its valid values."""

    path: tuple[str, ...]
    """Names of the enclosing sections, outermost first, followed by the name of the key."""
    spec: Spec

    @property
    def name(self) -> str:
        """Returns the key's path joined by dots, such as "zero_optimization.stage"."""
        return ".".join(self.path)


def accepted_keys() -> Iterator[AcceptedKey]:
    """Yields every DeepSpeed key, at every level, that accepts more than one value."""
    for path, spec in _walk(DEEPSPEED_KEYS, ()):
        if isinstance(spec, Spec) and not isinstance(spec, Fixed):
            yield AcceptedKey(path, spec)


def unused_keys(deepspeed: Mapping[str, Any]) -> list[str]:
    """Returns the dotted names of the given DeepSpeed keys that have no effect in the run's ZeRO stage."""
    stage = DeepSpeedOptions(deepspeed).zero_stage
    return [key.name for key in accepted_keys() if stage not in key.spec.stages and _is_given(deepspeed, key.path)]


def _is_given(mapping: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    for name in path:
        if name not in mapping:
            return False
        mapping = mapping[name]
    return True


def _walk(
    keys: Mapping[str, Spec | Refused | Section], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Spec | Refused]]:
    for name, spec in keys.items():
        if isinstance(spec, Section):
            yield from _walk(spec.keys, (*path, name))
        else:
            yield (*path, name), spec
