"""Times how long Python and PyTorch take to launch a layer's kernels, on an emulated GPU whose kernels do nothing."""

import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.benchmarks.empty_results import empty_results
from beit3_ds.config import ModelConfig
from beit3_ds.kernels.triton.fake_driver import FakeGPU, fake_gpu
from beit3_ds.model.beit3 import BEiT3
from beit3_ds.model.block import Block

_NUM_LAYERS = 4
_WARM_UPS = 3
_ARCHITECTURE = 90
_NARROW: dict[str, Any] = {"num_layers": _NUM_LAYERS, "patch_size": 4, "image_size": 8, "text_vocab_size": 64}
"""Sizes of the timed models. They are small, because large allocations take time on a CPU but not on a GPU."""


class LayerTimes(NamedTuple):
    """Holds the CPU times and the numbers of kernel launches for one layer. Times are medians."""

    forward_ms: float
    """Milliseconds of the forward pass."""
    backward_ms: float
    """Milliseconds of the backward pass."""
    total_ms: float
    """Milliseconds of the forward and backward pass together."""
    forward_launches: float
    """Number of kernel launches in the forward pass."""
    backward_launches: float
    """Number of kernel launches in the backward pass."""


def layer_models() -> dict[str, ModelConfig]:
    """Returns the configurations of two narrow models, by name.

    "base" is built like the base model: each modality has its own attention and FFN weights, and blocks have
    sub-LayerNorm. "giant" is built like the giant model: the modalities share attention weights, and blocks have no
    sub-LayerNorm.
    """
    base = ModelConfig(
        **_NARROW,
        hidden_size=192,
        ffn_hidden_size=768,
        num_attention_heads=12,
        layout="decoupled",
        num_vision_language_layers=0,
        sub_layernorm=True,
    )
    giant = ModelConfig(
        **_NARROW, hidden_size=256, ffn_hidden_size=1024, num_attention_heads=16, num_vision_language_layers=0
    )
    return {"base": base, "giant": giant}


def time_layer(config: ModelConfig, rounds: int) -> LayerTimes:
    """Returns this thread's CPU time for launching the kernels of one bf16 layer.

    The layer multiplies the outputs of attention and FFN with factors, as in stochastic depth, but drops no sample.

    Args:
        config: model whose blocks all have the same experts.
        rounds: number of forward and backward passes; the result is the median.
    """
    with fake_gpu(_ARCHITECTURE, compiles=False) as gpu, empty_results():
        model = BEiT3(config).to(torch.bfloat16)
        batch = _build_batch(config)
        x_TD = torch.zeros(batch.num_rows, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        times = []
        for _ in range(_WARM_UPS + rounds):
            times.append(_time_step([model.blocks[str(i)] for i in range(_NUM_LAYERS)], x_TD, batch, gpu))
            model.zero_grad()
        columns = list(zip(*times[_WARM_UPS:], strict=True))
        return LayerTimes(*(statistics.median(column) / _NUM_LAYERS for column in columns))


def _time_step(blocks: list[Any], x_TD: Tensor, batch: PackedBatch, gpu: FakeGPU) -> LayerTimes:
    gpu.launches.clear()
    start, y_TD = time.thread_time(), x_TD
    for block in blocks:
        assert isinstance(block, Block)
        y_TD = block(y_TD, batch)
    middle, forward_launches = time.thread_time(), gpu.launches.total()
    y_TD.backward(x_TD.detach())
    end, launches = time.thread_time(), gpu.launches.total()
    milliseconds = (1e3 * (middle - start), 1e3 * (end - middle), 1e3 * (end - start))
    return LayerTimes(*milliseconds, forward_launches, launches - forward_launches)


def _build_batch(config: ModelConfig) -> PackedBatch:
    """Returns a batch of one image, one pair and one text with few rows each."""
    caption, text = 4, 6
    return PackedBatch(
        num_images=1,
        num_pairs=1,
        caption_lengths=(caption,),
        text_lengths=(text,),
        pixels=None,
        patch_mask=torch.zeros(2, config.num_patches, dtype=torch.bool),
        token_ids=torch.zeros(caption + text, dtype=torch.int64),
        drop_path=torch.full((3, config.num_layers, 2), 1 / 0.9),
    )
