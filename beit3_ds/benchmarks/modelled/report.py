"""Formats modelled times of ops and training steps as Markdown.

The report compares old code with current code, and lists the assumptions.
"""

from collections.abc import Sequence
from pathlib import Path

from beit3_ds.benchmarks.modelled.block import BlockShape, OpTime, block_times
from beit3_ds.benchmarks.modelled.rates import RATES, SOURCES
from beit3_ds.benchmarks.modelled.step import HostTimes, step_time
from beit3_ds.config import load_run_config
from beit3_ds.config.model import MODEL_SIZES

_ROWS, _SEQUENCE = 16384, 197
_STEPS = (("base_8gpu.json", 8), ("giant_zero3_64gpu.json", 64))
_STEP_GPU = "h100-sxm"

HOST = {
    768: HostTimes((4.0e-3, 1.0e-3), (11e-3, 1e-3), (2.3, 1.25)),
    1408: HostTimes((1.9e-3, 0.8e-3), (11e-3, 1e-3), (2.3, 1.25)),
}
"""Times on the host, by the hidden size of the model.

768 is the base model with separate attention and FFN weights for each modality, and with sub-LayerNorm. 1408 is the
giant model. The three pairs are `layer`, `norm` and `zero3_ratio` of `HostTimes`. In each pair, the first value is for
the code before its optimization, and the second value is for the current code. The second value of `norm` is an
assumption. All other values were measured on an idle CPU with empty kernel launches. `beit3 bench host` repeats these
measurements for the current code.
"""

UNKNOWN = (
    "communication: gradients, ZeRO-3's gathers and tensor parallelism are taken to overlap completely",
    "data: pixels and tokens are taken to be ready",
    "what a choice by measurement really finds: rates of small or odd products, of attention at these lengths, clocks "
    "under load and power limits",
    "rows that the last FFN and dropped branches leave out, and texts that are shorter than the limit: both make steps "
    "shorter",
    "time between kernels on the GPU, and memory allocation",
)


def describe_modelled(config_dir: Path) -> str:
    """Returns tables with the modelled times of ops and steps, as Markdown.

    Args:
        config_dir: folder with the run configs.
    """
    lines = ["All times are *modelled*; nothing was measured on a GPU.", "", "Assumed rates:", ""]
    lines += [f"* {source}" for source in SOURCES]
    for size in ("base", "large", "giant"):
        lines += ["", *_describe_ops(size)]
    for name, world_size in _STEPS:
        lines += ["", *_describe_step(config_dir / name, world_size)]
    lines += ["", "The model does not know:", ""]
    return "\n".join([*lines, *(f"* {item}" for item in UNKNOWN)])


def _describe_ops(size: str) -> list[str]:
    """Returns the lines of a table with the modelled times of the ops in one block with sub-LN.

    The block computes `_ROWS` rows, in sequences of `_SEQUENCE` rows. An image at 224 px with patches of 16 px has
    `_SEQUENCE` rows.
    """
    model = MODEL_SIZES[size]
    experts = (1.0,) if size == "giant" else (0.8, 0.2)
    shape = BlockShape(
        _ROWS, _ROWS * _SEQUENCE, model["hidden_size"], model["ffn_hidden_size"], True, attention_lengths=experts
    )
    columns = [block_times(rates, shape) for rates in RATES.values()]
    head = " | ".join(f"{name}: before | now" for name in RATES)
    title = f"One block of {size} with sub-LN, {_ROWS} rows, bf16, us:"
    rows = [_join(ops[0].name, [time for op in ops for time in op[1:]]) for ops in zip(*columns, strict=True)]
    totals = [OpTime("block", *(sum(op[i] for op in ops) for i in (1, 2))) for ops in columns]  # type: ignore[misc]
    ratios = " | ".join(f"{total.before / total.now:.2f} x |" for total in totals)
    return [
        title,
        "",
        f"| op | {head} |",
        "|---" * (1 + 2 * len(RATES)) + "|",
        *rows,
        _join("block", [time for total in totals for time in total[1:]]),
        f"| before / now | {ratios}",
    ]


def _join(name: str, seconds: Sequence[float]) -> str:
    return f"| {name} | " + " | ".join(f"{value * 1e6:.0f}" for value in seconds) + " |"


def _describe_step(path: Path, world_size: int) -> list[str]:
    config = load_run_config(path)
    rates = RATES[_STEP_GPU]
    step = step_time(config, world_size, rates, HOST[config.model.hidden_size])
    total = step.total()
    mfu = [step.flops / time / rates.gpu.half_flops for time in total[1:]]
    rows = [f"| {part.name} | {part.before * 1e3:.1f} | {part.now * 1e3:.1f} |" for part in (*step.parts, total)]
    return [
        f"A step of `{path.name}` on {world_size} GPUs of the kind {_STEP_GPU}, ms per rank:",
        "",
        "| part | before | now |",
        "|---|---|---|",
        *rows,
        f"| MFU | {mfu[0]:.0%} | {mfu[1]:.0%} |",
        f"| before / now | {total.before / total.now:.2f} x | |",
    ]
