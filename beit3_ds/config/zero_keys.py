"""Lists the keys of DeepSpeed 0.19.8's section `zero_optimization`; other keys are in `deepspeed_keys`."""

from beit3_ds.config.key_specs import Choice, Fixed, Flag, Number, Refused, Section
from beit3_ds.config.numbers import Range

_LARGEST_BUCKET = 2**31 - 2
"""Maximum bucket size in elements. DeepSpeed allocates whole buckets, and this one takes 8 GiB in float32."""

REMOVED = "DeepSpeed 0.19 removed it. Leave it out."
OWN_CHECKPOINTS = "checkpoints are this project's own (docs/checkpoints.md). Leave it out."
NVME = "it belongs to offloading to NVMe, whose files checkpoints do not read. Leave it out."

_DEPRECATED = "DeepSpeed deprecates it. Use {}."
_NO_NVME = "checkpoints do not read the files of nvme"
_ORDER = "it reorders the flat buffers, but DeepSpeed's map from parameters to them stays the same. Leave it out."
_PACKING = "it only changes the padding of the flat buffers. Leave it out."
_QUANTIZED = "parameters or gradients would lose precision that checkpoints and the comparison of losses need."

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
        "ratio": Fixed(value=1.0, reason="it needs DeepSpeed's own CPU Adam; the optimizer here is torch's AdamW."),
        "super_offload": Fixed(value=False, reason="it needs DeepSpeed's own CPU Adam and CUDA."),
        "cpuadam_cores_perc": Refused(reason="it belongs to super_offload. Leave it out."),
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
            effect="State divided over data-parallel ranks: none; optimizer state; also gradients; also parameters.",
        ),
        "contiguous_gradients": Flag(
            stages=(1, 2, 3), effect="Gradients are copied into one buffer before they are reduced."
        ),
        "reduce_scatter": Flag(
            stages=(1, 2, 3), effect="Each rank receives its own part of the gradients, not all of them."
        ),
        "reduce_bucket_size": Number(
            range=Range(1, _LARGEST_BUCKET),
            stages=(1, 2, 3),
            samples=(1000, 500_000_000),
            effect="Gradient elements that are reduced at a time.",
        ),
        "use_multi_rank_bucket_allreduce": Flag(
            stages=(1, 2), effect="One all-reduce for the parts of several ranks instead of one reduce each."
        ),
        "allgather_bucket_size": Number(
            range=Range(2, _LARGEST_BUCKET),
            multiple_of=2,
            stages=(1, 2),
            samples=(1000, 500_000_000),
            effect="Elements of updated parameters that are gathered at a time.",
        ),
        "overlap_comm": Flag(stages=(1, 2, 3), effect="Gradients are reduced during the backward pass."),
        "sub_group_size": Number(
            range=Range(1),
            stages=(3,),
            samples=(10_000, 1_000_000_000),
            effect="Elements that AdamW updates at a time.",
        ),
        "stage3_prefetch_bucket_size": Number(
            range=Range(0, _LARGEST_BUCKET),
            stages=(3,),
            samples=(0, 50_000_000),
            effect="Elements of parameters that are gathered ahead of use.",
        ),
        "stage3_param_persistence_threshold": Number(
            range=Range(0),
            stages=(3,),
            samples=(0, 20_000),
            effect="Parameters of fewer elements stay whole on every rank.",
        ),
        "stage3_model_persistence_threshold": Number(
            range=Range(0),
            stages=(3,),
            samples=(0, 10_000),
            effect="Elements that may stay whole on a rank.",
        ),
        "stage3_max_live_parameters": Number(
            range=Range(0),
            stages=(3,),
            samples=(0, 1_000_000_000),
            effect="Gathered elements that a rank keeps before it releases some.",
        ),
        "stage3_max_reuse_distance": Number(
            range=Range(0),
            stages=(3,),
            samples=(0, 1_000_000_000),
            effect="A parameter is not released if its next use is at most this many elements away.",
        ),
        "stage3_use_all_reduce_for_fetch_params": Flag(
            stages=(3,), effect="Parameters are gathered by an all-reduce instead of an all-gather."
        ),
        "stage3_allgather_sequential": Flag(
            stages=(3,), effect="Parameters are gathered one by one, without a bucket to copy them to."
        ),
        "log_trace_cache_warnings": Flag(
            stages=(3,), effect="DeepSpeed logs when the order of modules differs from the previous step."
        ),
        "enable_sanity_checks": Flag(stages=(3,), effect="DeepSpeed compares its bookkeeping among ranks."),
        "offload_param": _OFFLOAD_PARAM,
        "offload_optimizer": _OFFLOAD_OPTIMIZER,
        "compute_grad_norm": Fixed(
            value=True, reason="steps with a NaN are recognised by the gradients' norm and skipped."
        ),
        "ignore_unused_parameters": Fixed(
            value=True, reason="every parameter takes part in every micro-batch, so there is nothing to report."
        ),
        "round_robin_gradients": Fixed(value=False, reason=_ORDER),
        "parameter_alignment": Fixed(value=False, reason=_PACKING),
        "zero_hpz_partition_size": Fixed(
            value=1, reason="it keeps a second copy of the parameters inside a node, which was never tested here."
        ),
        "zero_quantized_weights": Fixed(value=False, reason=_QUANTIZED),
        "zero_quantized_nontrainable_weights": Fixed(value=False, reason=_QUANTIZED),
        "zero_quantized_gradients": Fixed(value=False, reason=_QUANTIZED),
        "stage3_module_granularity_threshold": Fixed(
            value=0, reason="blocks would be gathered whole, against what `beit3 check` models."
        ),
        "legacy_stage1": Fixed(value=False, reason=REMOVED),
        "elastic_checkpoint": Fixed(value=False, reason=OWN_CHECKPOINTS),
        "pipeline_loading_checkpoint": Fixed(value=False, reason=OWN_CHECKPOINTS),
        "load_from_fp32_weights": Fixed(value=True, reason=OWN_CHECKPOINTS),
        "stage3_gather_16bit_weights_on_model_save": Fixed(
            value=False, reason="it belongs to save_16bit_model(). Use `beit3 export`."
        ),
        "allgather_partitions": Fixed(value=True, reason="DeepSpeed 0.19 no longer reads it."),
        "memory_efficient_linear": Fixed(
            value=True, reason="it belongs to zero.Init, which is not used. Leave it out."
        ),
        "override_module_apply": Fixed(value=True, reason="it belongs to zero.Init, which is not used. Leave it out."),
        "leaf_module": Refused(reason="blocks would be gathered whole, against what `beit3 check` models."),
        "save_muon_momentum_buffer_in_memory": Refused(reason="the optimizer is AdamW. Leave it out."),
        "zenflow": Refused(reason="it updates important columns more often, which is another recipe. Leave it out."),
        "cpu_offload": Refused(reason=_DEPRECATED.format('"offload_optimizer": {"device": "cpu"}')),
        "cpu_offload_param": Refused(reason=_DEPRECATED.format('"offload_param": {"device": "cpu"}')),
        "cpu_offload_use_pin_memory": Refused(reason=_DEPRECATED.format("pin_memory in the offload sections")),
        "stage3_gather_fp16_weights_on_model_save": Refused(reason="DeepSpeed deprecates it. Use `beit3 export`."),
        "mics_shard_size": Refused(reason=REMOVED),
        "mics_hierarchical_params_gather": Refused(reason=REMOVED),
        "zeropp_loco_param": Refused(reason=REMOVED),
        **{
            name: Refused(reason=f"one name for one setting: write stage3_{name}.")
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
