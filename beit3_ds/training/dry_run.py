"""What a config would train and what that would cost, without reading data or starting anything."""

import torch

from beit3_ds.config import RunConfig, check_layout
from beit3_ds.costs import describe_stages
from beit3_ds.model import BEiT3
from beit3_ds.training.optimizer import decays


def describe_run(config: RunConfig, world_size: int) -> str:
    """Checks batch sizes for `world_size` ranks, builds the model on the meta device and says what would run.

    Ends with a table of every pipeline stage's memory and traffic, which are modelled (`costs.describe_stages`).

    Raises:
        ConfigError: if the layout does not fit, as `check_layout` says.
    """
    data_parallel_size = check_layout(config, world_size)
    micro_batch = config.micro_batch_size(data_parallel_size)
    with torch.device("meta"):
        model = BEiT3(config.model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    backbone = sum(size for name, size in sizes.items() if not name.startswith(("heads.mim", "heads.mlm")))
    total = sum(sizes.values())
    decayed = sum(size for name, size in sizes.items() if decays(name))
    training, engine = config.training, config.engine_config(data_parallel_size)
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
    precision = "bf16" if config.deepspeed.get("bf16", {}).get("enabled") else "fp32"
    rows = {
        "parameters": f"{total / 1e6:,.1f}M, of which backbone {backbone / 1e6:,.1f}M; {decayed / total:.1%} decay",
        "model": f"{config.model.num_layers} x {config.model.hidden_size} ({config.model.layout}), "
        f"{config.model.grid_size} x {config.model.grid_size} patches, text up to {config.model.max_text_length}",
        "ranks": f"{world_size} = {data_parallel_size} data x {config.parallel.tensor_parallel_size} tensor x "
        f"{config.parallel.pipeline_parallel_size} pipeline, ZeRO-{stage}, {precision}",
        "step": f"{engine['train_batch_size']} samples: "
        + ", ".join(f"{stream.samples_per_step} {name}" for name, stream in config.data.streams().items()),
        "micro-batch": f"{sum(micro_batch)} samples a data-parallel rank: "
        + ", ".join(f"{value} {name}" for name, value in micro_batch._asdict().items())
        + f"; {config.gradient_accumulation_steps} a step",
        "schedule": f"{training.total_steps:,} steps, {training.warmup_steps:,} warmup, lr {training.learning_rate:g}",
        "output": training.output_dir,
    }
    lines = [f"{name:<12} {value}" for name, value in rows.items()]
    return "\n".join([*lines, "", describe_stages(config, world_size, decays)])
