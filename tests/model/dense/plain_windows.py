"""Implements the dense backbone plainly: each block divides padded maps into windows and masks the padding.

It shares no code with the packed model, only parameters under the same names.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.config import ModelConfig

Parameters = Mapping[str, Tensor]


def plain_maps(p: Parameters, config: ModelConfig, image: Tensor) -> Tensor:
    """Returns one image's features after all blocks and the final norm, (rows, columns, hidden size)."""
    x = F.conv2d(image[None], p["embeddings.patch.weight"], p["embeddings.patch.bias"], stride=config.patch_size)
    x = x[0].permute(1, 2, 0)
    x = x + _positions(p["embeddings.image_position"], config.grid_size, *x.shape[:2])
    for layer in range(config.num_layers):
        x = x + _attention(p, config, layer, x)
        name, expert = f"blocks.{layer}.ffn", "vision"
        h = _norm(p, f"{name}.norm", expert, x, config)
        h = F.gelu(_linear(p, f"{name}.fc1", expert, h))
        if config.sub_layernorm:
            h = _norm(p, f"{name}.sub_norm", expert, h, config)
        x = x + _linear(p, f"{name}.fc2", expert, h)
    return _norm(p, "norm", config.attention_experts[0], x, config)


def _positions(table: Tensor, side: int, rows: int, columns: int) -> Tensor:
    grid, needed = table.unflatten(0, (side, side)), max(rows, columns)
    if needed > side:
        resized = F.interpolate(grid.permute(2, 0, 1)[None], (needed, needed), mode="bicubic", align_corners=False)
        grid = resized[0].permute(1, 2, 0)
    return grid[:rows, :columns]


def _attention(p: Parameters, config: ModelConfig, layer: int, x: Tensor) -> Tensor:
    assert config.dense is not None
    name, expert = f"blocks.{layer}.attention", config.attention_experts[0]
    rows, columns, _ = x.shape
    is_global = not config.dense.window_size or layer in config.dense.global_blocks
    height, width = (rows, columns) if is_global else (config.dense.window_size,) * 2
    h = _norm(p, f"{name}.norm", expert, x, config)
    padding = (0, 0, 0, -columns % width, 0, -rows % height)
    real = F.pad(torch.ones(rows, columns, 1), padding)[..., 0] > 0
    parts = []
    for projection in ("q_proj", "k_proj", "v_proj"):
        # Padding has some value, as it has in detectron2 after the projection's bias; only the mask removes it.
        projected = F.pad(_linear(p, f"{name}.{projection}", expert, h), padding, value=3.0)
        heads = _partition(projected, height, width).unflatten(-1, (config.num_attention_heads, -1))
        parts.append(heads.permute(0, 2, 1, 3))  # (windows, heads, patches, head width)
    q, k, v = parts
    scores = q @ k.mT / math.sqrt(config.head_size)
    if config.dense.relative_positions:
        scores = scores + _bias(p, name, q, height, width)
    seen = _partition(real[..., None], height, width)[:, None, None, :, 0]
    y = (scores.masked_fill(~seen, -math.inf).softmax(-1) @ v).permute(0, 2, 1, 3).flatten(2)
    y = _unpartition(y, rows + -rows % height, columns + -columns % width, height, width)[:rows, :columns]
    if config.sub_layernorm:
        y = _norm(p, f"{name}.sub_norm", expert, y, config)
    return _linear(p, f"{name}.out_proj", expert, y)


def _bias(p: Parameters, name: str, q: Tensor, height: int, width: int) -> Tensor:
    """Returns the bias of relative positions, (windows, heads, patches, patches).

    For a query patch (i, j) and a key patch (k, l), it is q_ij rows[i - k] + q_ij columns[j - l].
    """
    q = q.unflatten(2, (height, width))
    tables = []
    for axis, extent in (("rows", height), ("columns", width)):
        table = p[f"{name}.relative_position.{axis}"]
        side = (len(table) + 1) // 2
        if extent > side:
            table = F.interpolate(table.T[None], 2 * extent - 1, mode="linear", align_corners=False)[0].T
            side = extent
        distances = torch.arange(extent)[:, None] - torch.arange(extent)
        tables.append(table[distances + side - 1])
    by_row = torch.einsum("nhijc,ikc->nhijk", q, tables[0])
    by_column = torch.einsum("nhijc,jlc->nhijl", q, tables[1])
    return (by_row[..., :, None] + by_column[..., None, :]).flatten(4).flatten(2, 3)


def _partition(x: Tensor, height: int, width: int) -> Tensor:
    blocks = x.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    return blocks.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)


def _unpartition(x: Tensor, rows: int, columns: int, height: int, width: int) -> Tensor:
    blocks = x.unflatten(1, (height, width)).unflatten(0, (rows // height, columns // width))
    return blocks.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)


def _linear(p: Parameters, name: str, expert: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight_{expert}"], p[f"{name}.bias_{expert}"])


def _norm(p: Parameters, name: str, expert: str, x: Tensor, config: ModelConfig) -> Tensor:
    weight, bias = p[f"{name}.weight_{expert}"], p[f"{name}.bias_{expert}"]
    return F.layer_norm(x, x.shape[-1:], weight, bias, config.layer_norm_epsilon)
