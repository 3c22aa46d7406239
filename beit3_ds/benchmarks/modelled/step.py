"""Models the time of one rank's pretraining step, with the project's current code and with the unoptimized code."""

from typing import NamedTuple

from beit3_ds.benchmarks.modelled.block import BlockShape, OpTime, block_times
from beit3_ds.benchmarks.modelled.rates import Rates
from beit3_ds.config import RunConfig
from beit3_ds.config.visual_tokenizer import VisualTokenizerConfig
from beit3_ds.tasks.pretraining.config import pretraining_config

_LOGIT_PASSES = 4
"""Number of times that a head's half-precision logits are read or written: two in the forward pass, two in the backward
pass."""
_UPDATE_BYTES = 30
"""Bytes per parameter that AdamW reads and writes: float32 weight, gradient and two moments, and the bf16 weight."""


class HostTimes(NamedTuple):
    """Holds times that Python and PyTorch need on the host.

    Each field has two values. The first is the value before the project's code was optimized, and the second is the
    current value.
    """

    layer: tuple[float, float]
    """Host time per block in seconds: before the project's code was optimized, and now. Each value is the time for
    launching the kernels of the forward and backward pass."""
    norm: tuple[float, float]
    """Seconds per step for the gradient norm: before the project's code was optimized, and now. The GPU is idle during
    this time."""
    zero3_ratio: tuple[float, float]
    """Factors by which ZeRO-3's hooks increase the time for launching a block's kernels: first for the project's code
    before it was optimized, then for the current code."""


class StepTime(NamedTuple):
    """Holds the modelled times of a training step's parts, and the step's FLOPs."""

    parts: list[OpTime]
    """Times of the step's parts. The Transformer blocks have two entries, the time on the GPU and the time on the host.
    These two times overlap."""
    flops: float
    """FLOPs of all matrix products of the model, forward and backward, without the visual tokenizer."""

    def total(self) -> OpTime:
        """Returns the time of the step. The blocks' GPU time and host time overlap, so only the longer one counts."""
        by_name = {part.name: part for part in self.parts}
        gpu, host = by_name["blocks, GPU"], by_name["blocks, host"]
        rest = [part for part in self.parts if part not in (gpu, host)]
        before = max(gpu.before, host.before) + sum(part.before for part in rest)
        return OpTime("step", before, max(gpu.now, host.now) + sum(part.now for part in rest))


def step_time(config: RunConfig, world_size: int, rates: Rates, host: HostTimes) -> StepTime:
    """Computes the modelled time of one rank's step.

    Assumes that the run uses neither tensor nor pipeline parallelism, that texts have maximum length, that every block
    computes all rows, and that communication takes no time.
    """
    model, data, ratios = config.model, config.data, pretraining_config(config)
    shares = config.step_shares(config.parallel.data_parallel_size(world_size))
    sizes = shares.divide_rank(shares.rank_samples(0))
    images, pairs, texts = (float(sum(counts)) for counts in zip(*sizes, strict=True))
    image_length, pair_length = 1 + model.num_patches, 1 + model.num_patches + data.pair_text_length
    rows = images * image_length + pairs * pair_length + texts * data.text_length
    attended = images * image_length**2 + pairs * pair_length**2 + texts * data.text_length**2
    vision = (images + pairs) * image_length / rows
    experts = (1.0,) if model.layout == "shared" else (vision, 1 - vision)
    shape = BlockShape(
        rows / len(sizes),
        attended / len(sizes),
        model.hidden_size,
        model.ffn_hidden_size,
        model.sub_layernorm,
        4 if config.training.fp32_residual_connection else 2,
        experts,
        (vision, 1 - vision),
    )
    number = len(sizes) * model.num_layers
    block = block_times(rates, shape)
    hooks = host.zero3_ratio if config.options.zero_stage == 3 else (1.0, 1.0)
    masked_patches = (images + pairs) * model.num_patches * ratios.image_mask_ratio
    masked_tokens = (
        pairs * data.pair_text_length * ratios.pair_text_mask_ratio + texts * data.text_length * ratios.text_mask_ratio
    )
    logits = masked_patches * model.visual_vocab_size + masked_tokens * model.text_vocab_size
    patches = 2 * 2 * (images + pairs) * model.num_patches * 3 * model.patch_size**2 * model.hidden_size
    heads = rates.product_seconds(3 * 2 * logits * model.hidden_size, rates.library)
    heads += rates.pass_seconds(_LOGIT_PASSES * 2 * logits) + rates.product_seconds(patches, rates.library)
    update = rates.pass_seconds(
        _UPDATE_BYTES * _num_parameters(config) / config.parallel.data_parallel_size(world_size)
    )
    tokenizer = tokenizer_flops(config.tokenizers.visual) * (images + pairs)
    in_float32 = tokenizer / (rates.float32 * rates.gpu.float32_flops)
    parts = [
        OpTime("visual tokenizer", in_float32, rates.product_seconds(tokenizer, rates.triton)),
        OpTime("blocks, GPU", *(number * sum(op[index] for op in block) for index in (1, 2))),  # type: ignore[misc]
        OpTime("blocks, host", *(number * host.layer[index] * hooks[index] for index in (0, 1))),
        OpTime("embeddings, heads and losses", heads, heads),
        OpTime("gradient norm, host", *host.norm),
        OpTime("update", update, update),
    ]
    per_row = 4 * model.hidden_size**2 + 2 * model.hidden_size * model.ffn_hidden_size
    flops = 3 * model.num_layers * (2 * rows * per_row + 4 * attended * model.hidden_size)
    return StepTime(parts, flops + 3 * 2 * logits * model.hidden_size + patches)


def tokenizer_flops(config: VisualTokenizerConfig) -> float:
    """Returns the FLOPs of the visual tokenizer's encoder per image."""
    length, hidden = config.grid_size**2, config.hidden_size
    return config.num_layers * (2 * length * 12 * hidden**2 + 4 * length**2 * hidden)


def _num_parameters(config: RunConfig) -> float:
    """Returns the approximate number of parameters: experts of attention and FFN, embedding tables, and heads."""
    model = config.model
    attention = 4 * model.hidden_size**2 * len(model.attention_experts)
    blocks = sum(
        attention + 2 * model.hidden_size * model.ffn_hidden_size * len(model.experts(layer))
        for layer in range(model.num_layers)
    )
    return blocks + model.hidden_size * (2 * model.text_vocab_size + model.visual_vocab_size)
