"""Compares the CPU time of two implementations of window attention: this project's packed rows, and padded feature
maps.

The padded blocks follow detectron2's ViTDet and SAM. All images are padded to the largest feature map. Every block pads
the normalised map to a multiple of the window size, and divides it into windows. Padding rows are computed like rows of
the image.
"""

# B images, H and W rows and columns of the padded maps, D hidden, N windows, L patches of a window.

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.config import DenseConfig, ModelConfig
from beit3_ds.data.packing import pack_grids
from beit3_ds.model import BEiT3, initialize_parameters
from beit3_ds.model.dense.canvas import to_canvas
from beit3_ds.patch_grids import Grids

MIXED_GRIDS: Grids = ((64, 64), (64, 48))
"""Patch grids (rows, columns) of images of 1024 x 1024 and 1024 x 768 pixels."""

_WINDOW = 14


def measure_windows(rounds: int = 5, grids: Grids = MIXED_GRIDS, num_layers: int = 4) -> dict[str, Any]:
    """Times forward and backward passes of blocks with window attention, in turn with the padded baseline.

    The blocks have width 192 and windows of 14 x 14 patches.

    Args:
        rounds: measurements per implementation; the ratio is the median over rounds.
        grids: rows and columns of patches of each image.
        num_layers: number of blocks, all with windows.

    Returns:
        `ratio_window_attention`: the baseline's CPU time divided by this project's CPU time. Also the median CPU
            seconds of each implementation.
    """
    model = build_packed(num_layers)
    baseline = PaddedBlocks(model)
    batch = pack_grids([torch.zeros(3, height * 16, width * 16) for height, width in grids], 16)
    draws = torch.Generator().manual_seed(0)
    x_TD = torch.randn(batch.num_rows, model.config.hidden_size, generator=draws).requires_grad_()
    x_BHWD = to_canvas(x_TD.detach(), grids, _WINDOW).permute(0, 2, 3, 1).contiguous().requires_grad_()
    blocks = range(1, 1 + num_layers)
    sides: dict[str, Callable[[], Tensor]] = {
        "packed": lambda: model.run_layers(batch, x_TD, blocks),
        "padded": lambda: baseline(x_BHWD),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):  # the first round warms up
        for side, run in sides.items():
            start = time.process_time()
            run().square().mean().backward()
            if number:
                seconds[side].append(time.process_time() - start)
    ratios = [padded / packed for padded, packed in zip(seconds["padded"], seconds["packed"], strict=True)]
    medians = {f"{side}_windows_cpu_seconds": statistics.median(times) for side, times in seconds.items()}
    return {"ratio_window_attention": statistics.median(ratios), **medians}


def build_packed(num_layers: int) -> BEiT3:
    """Builds this project's model with width 192 and 3 heads, with window attention in all blocks."""
    config = ModelConfig(
        num_layers=num_layers,
        hidden_size=192,
        ffn_hidden_size=768,
        num_attention_heads=3,
        patch_size=16,
        image_size=1024,
        num_vision_language_layers=0,
        inputs=("images",),
        dense=DenseConfig(window_size=_WINDOW),
    )
    model = BEiT3(config)
    initialize_parameters(model, config, 0)
    return model


class PaddedBlocks(nn.Module):
    """Computes the blocks of a model on padded feature maps, with copies of the model's weights."""

    def __init__(self, model: BEiT3) -> None:
        super().__init__()
        weights = dict(model.named_parameters())
        self.blocks = nn.ModuleList(
            _PaddedBlock(model.config, weights, f"blocks.{layer}") for layer in range(model.config.num_layers)
        )

    def forward(self, x_BHWD: Tensor) -> Tensor:
        """Applies all blocks to padded feature maps, (B, H, W, D), and returns maps of the same shape."""
        for block in self.blocks:
            x_BHWD = block(x_BHWD)
        return x_BHWD


class _PaddedBlock(nn.Module):
    def __init__(self, config: ModelConfig, weights: dict[str, nn.Parameter], name: str) -> None:
        super().__init__()
        hidden, ffn_hidden, self.heads = config.hidden_size, config.ffn_hidden_size, config.num_attention_heads
        self.norm1, self.norm2 = (nn.LayerNorm(hidden, config.layer_norm_epsilon) for _ in range(2))
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.fc1, self.fc2 = nn.Linear(hidden, ffn_hidden), nn.Linear(ffn_hidden, hidden)
        sources = {
            "norm1": ["attention.norm.{}_shared"],
            "qkv": [f"attention.{letter}_proj.{{}}_shared" for letter in "qkv"],
            "proj": ["attention.out_proj.{}_shared"],
            "norm2": ["ffn.norm.{}_vision"],
            "fc1": ["ffn.fc1.{}_vision"],
            "fc2": ["ffn.fc2.{}_vision"],
        }
        with torch.no_grad():
            for module, names in sources.items():
                for kind in ("weight", "bias"):
                    parts: list[Tensor] = [weights[f"{name}.{source.format(kind)}"] for source in names]
                    getattr(getattr(self, module), kind).copy_(torch.cat(parts))

    def forward(self, x_BHWD: Tensor) -> Tensor:
        height, width = x_BHWD.shape[1:3]
        h_BHWD = F.pad(self.norm1(x_BHWD), (0, 0, 0, -width % _WINDOW, 0, -height % _WINDOW))
        rows, columns = (side // _WINDOW for side in h_BHWD.shape[1:3])
        windows = h_BHWD.unflatten(2, (columns, _WINDOW)).unflatten(1, (rows, _WINDOW)).transpose(2, 3)
        h_NLD = windows.reshape(-1, _WINDOW * _WINDOW, x_BHWD.shape[3])
        q, k, v = self.qkv(h_NLD).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y_NLD = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        maps = y_NLD.view(len(x_BHWD), rows, columns, _WINDOW, _WINDOW, -1).transpose(2, 3)
        x_BHWD = x_BHWD + maps.flatten(3, 4).flatten(1, 2)[:, :height, :width]
        return x_BHWD + self.fc2(F.gelu(self.fc1(self.norm2(x_BHWD))))
