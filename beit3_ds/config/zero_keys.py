"""Lists the keys of DeepSpeed 0.19.8's section `zero_optimization`; other keys are in `deepspeed_keys`."""

from beit3_ds.config.key_specs import Choice, Fixed, Flag, Number, Refused, Section
from beit3_ds.config.numbers import Range

_LARGEST_BUCKET = 2**31 - 2
"""Maximum bucket size in elements. DeepSpeed allocates whole buckets, and this size takes 8 GiB in float32."""

REMOVED = "DeepSpeed 0.19 removed it. Leave it out."
OWN_CHECKPOINTS = "this project writes its own checkpoints (docs/checkpoints.md). Leave it out."
NVME = "the key is for offloading to NVMe, and checkpoints cannot read NVMe files. Leave it out."

_DEPRECATED = "the key is deprecated in DeepSpeed. Use {}."
_NO_NVME = "checkpoints cannot read NVMe files"
_ORDER = "DeepSpeed would reorder the flat buffers without updating its map of parameters. Leave it out."
_PACKING = "the key only changes the padding of the flat buffers. Leave it out."
_QUANTIZED = "checkpoints need the full precision of parameters and gradients."

_OFFLOAD_PARAM = Section(
    example='{"device": "cpu"}',
    keys={
        "device": Choice(
            values=("none", "cpu"),
            reason=_NO_NVME,
            stages=(3,),
            samples=("cpu",),
            effect="Parameters are kept in host memory until they are used.",
        ),
        "pin_memory": Flag(
            stages=(3,), effect="Offloaded parameters are page-locked, which speeds up copies to a GPU."
        ),
        **dict.fromkeys(("nvme_path", "buffer_count", "buffer_size", "max_in_cpu"), Refused(reason=NVME)),
    },
)

_OFFLOAD_OPTIMIZER = Section(
    example='{"device": "cpu"}',
    keys={
        "device": Choice(
            values=("none", "cpu"),
            reason=_NO_NVME,
            stages=(1, 2, 3),
            samples=("cpu",),
            effect="Float32 weights and moments are kept in host memory, where torch's AdamW updates them.",
        ),
        "pin_memory": Flag(
            stages=(1, 2, 3), effect="Offloaded optimizer state is page-locked, which speeds up copies to a GPU."
        ),
        "ratio": Fixed(
            value=1.0, reason="other values need DeepSpeed's CPU Adam; the optimizer here is torch's AdamW."
        ),
        "super_offload": Fixed(value=False, reason="the key needs DeepSpeed's CPU Adam and CUDA."),
        "cpuadam_cores_perc": Refused(reason="the key is for super_offload, which is refused. Leave it out."),
        **dict.fromkeys(
            ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init"), Refused(reason=NVME)
        ),
    },
)

ZERO = Section(
    example='{"stage": 1}',
    keys={
        "stage": Choice(
            values=(0, 1, 2, 3),
            samples=(0, 1, 2, 3),
            effect="Ranks divide nothing (0), optimizer state (1), also gradients (2), or also parameters (3).",
        ),
        "contiguous_gradients": Flag(
            stages=(1, 2, 3), effect="Gradients are copied into one buffer before they are reduced."
        ),
        "reduce_scatter": Flag(stages=(1, 2, 3), effect="Each rank receives only its own part of the gradients."),
        "reduce_bucket_size": Number(
            range=Range(1, _LARGEST_BUCKET),
            stages=(1, 2, 3),
            samples=(1000, 500_000_000),
            effect="Number of gradient elements that are reduced at a time.",
        ),
        "use_multi_rank_bucket_allreduce": Flag(
            stages=(1, 2),
            effect="One all-reduce serves the parts of several ranks; otherwise each part has its own reduce.",
        ),
        "allgather_bucket_size": Number(
            range=Range(2, _LARGEST_BUCKET),
            multiple_of=2,
            stages=(1, 2),
            samples=(1000, 500_000_000),
            effect="Number of updated parameter elements that are gathered at a time.",
        ),
        "overlap_comm": Flag(stages=(1, 2, 3), effect="Gradients are reduced during the backward pass."),
        "sub_group_size": Number(
            range=Range(1),
            stages=(3,),
            samples=(10_000, 1_000_000_000),
            effect="Number of elements that AdamW updates at a time.",
        ),
        "stage3_prefetch_bucket_size": Number(
            range=Range(0, _LARGEST_BUCKET),
            stages=(3,),
            samples=(0, 50_000_000),
            effect="Number of parameter elements that are gathered before they are used.",
        ),
        "stage3_param_persistence_threshold": Number(
            range=Range(0),
            stages=(3,),
            samples=(0, 20_000),
            effect="Parameters with fewer elements stay undivided on every rank.",
        ),
        "stage3_model_persistence_threshold": Number(
            range=Range(0),
            stages=(3,),
            samples=(0, 10_000),
            effect="Largest number of elements in undivided parameters of a rank.",
        ),
        "stage3_max_live_parameters": Number(
            range=Range(0),
            stages=(3,),
            samples=(0, 1_000_000_000),
            effect="Largest number of gathered elements that a rank keeps.",
        ),
        "stage3_max_reuse_distance": Number(
            range=Range(0),
            stages=(3,),
            samples=(0, 1_000_000_000),
            effect="A parameter stays gathered if at most this many elements are used before its next use.",
        ),
        "stage3_use_all_reduce_for_fetch_params": Flag(
            stages=(3,), effect="Parameters are gathered by all-reduce; otherwise by all-gather."
        ),
        "stage3_allgather_sequential": Flag(
            stages=(3,), effect="Parameters are gathered one by one, without copying them into a bucket."
        ),
        "log_trace_cache_warnings": Flag(
            stages=(3,), effect="DeepSpeed logs when the order of modules differs from the previous step."
        ),
        "enable_sanity_checks": Flag(stages=(3,), effect="DeepSpeed compares its internal state between ranks."),
        "offload_param": _OFFLOAD_PARAM,
        "offload_optimizer": _OFFLOAD_OPTIMIZER,
        "compute_grad_norm": Fixed(value=True, reason="the gradient norm reveals steps with a NaN, which are skipped."),
        "ignore_unused_parameters": Fixed(
            value=True, reason="no parameter is unused; every micro-batch uses all of them."
        ),
        "round_robin_gradients": Fixed(value=False, reason=_ORDER),
        "parameter_alignment": Fixed(value=False, reason=_PACKING),
        "zero_hpz_partition_size": Fixed(
            value=1, reason="a second copy of the parameters per node was never tested here."
        ),
        "zero_quantized_weights": Fixed(value=False, reason=_QUANTIZED),
        "zero_quantized_nontrainable_weights": Fixed(value=False, reason=_QUANTIZED),
        "zero_quantized_gradients": Fixed(value=False, reason=_QUANTIZED),
        "stage3_module_granularity_threshold": Fixed(
            value=0, reason="DeepSpeed would gather whole blocks, but `beit3 check` does not model that."
        ),
        "legacy_stage1": Fixed(value=False, reason=REMOVED),
        "elastic_checkpoint": Fixed(value=False, reason=OWN_CHECKPOINTS),
        "pipeline_loading_checkpoint": Fixed(value=False, reason=OWN_CHECKPOINTS),
        "load_from_fp32_weights": Fixed(value=True, reason=OWN_CHECKPOINTS),
        "stage3_gather_16bit_weights_on_model_save": Fixed(
            value=False, reason="the key is for save_16bit_model(). Use `beit3 export`."
        ),
        "allgather_partitions": Fixed(value=True, reason="DeepSpeed 0.19 ignores the key."),
        "memory_efficient_linear": Fixed(
            value=True, reason="the key is for zero.Init, which is not used. Leave it out."
        ),
        "override_module_apply": Fixed(value=True, reason="the key is for zero.Init, which is not used. Leave it out."),
        "leaf_module": Refused(reason="DeepSpeed would gather whole blocks, but `beit3 check` does not model that."),
        "save_muon_momentum_buffer_in_memory": Refused(reason="the optimizer is AdamW. Leave it out."),
        "zenflow": Refused(reason="ZenFlow changes the optimizer: it updates some columns more often. Leave it out."),
        "cpu_offload": Refused(reason=_DEPRECATED.format('"offload_optimizer": {"device": "cpu"}')),
        "cpu_offload_param": Refused(reason=_DEPRECATED.format('"offload_param": {"device": "cpu"}')),
        "cpu_offload_use_pin_memory": Refused(reason=_DEPRECATED.format("pin_memory in the offload sections")),
        "stage3_gather_fp16_weights_on_model_save": Refused(
            reason="the key is deprecated in DeepSpeed. Use `beit3 export`."
        ),
        "mics_shard_size": Refused(reason=REMOVED),
        "mics_hierarchical_params_gather": Refused(reason=REMOVED),
        "zeropp_loco_param": Refused(reason=REMOVED),
        **{
            name: Refused(reason=f"only the long name is accepted. Write stage3_{name}.")
            for name in (
                "prefetch_bucket_size",
                "param_persistence_threshold",
                "model_persistence_threshold",
                "max_live_parameters",
                "max_reuse_distance",
                "gather_16bit_weights_on_model_save",
                "module_granularity_threshold",
                "use_all_reduce_for_fetch_params",
                "allgather_sequential",
            )
        },
    },
)
"""Maps each key of the section `zero_optimization` to its accepted values or the reason for refusing it."""
