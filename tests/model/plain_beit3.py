"""Implements BEiT-3 plainly, as the reference: one padded sequence per sample, and one expert per row.

It shares no code with the packed model, only parameters under the same names.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig

Parameters = dict[str, Tensor]


def plain_losses(p: Parameters, config: ModelConfig, batch: PackedBatch) -> Tensor:
    """Returns the sums of cross entropies, float64, shape (4,): image MIM, text MLM, pair MIM, pair MLM."""
    samples = _unpack(batch)
    width = max((1 + config.num_patches) + config.max_text_length, 1)
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(4)]
    for number, sample in enumerate(samples):
        x, kind, real = _embed(p, config, sample, width)
        seen = real.expand(width, width)
        if batch.causal_captions and sample["modality"] == "pair":
            row, image = torch.arange(width), 1 + config.num_patches
            seen = seen & ((row < image) | (row <= row[:, None]))  # (query, key)
        for layer in range(config.num_layers):
            factors = _factors(batch, number, layer)
            x = _block(p, config, layer, x, kind, seen, sample["modality"], factors)
        vision_term, language_term = {"image": (0, 0), "pair": (2, 3), "text": (1, 1)}[sample["modality"]]
        for row, target in sample["patch_targets"].items():
            h = _norm(p, "norm", [_expert_of(config, "v")], x[[1 + row]], config)[0]
            logits = p["heads.mim.weight"] @ h + p["heads.mim.bias"]
            sums[vision_term] = sums[vision_term] + torch.logsumexp(logits, 0) - logits[target]
        first_text = 0 if sample["modality"] == "text" else 1 + config.num_patches
        for position, target in sample["token_targets"].items():
            h = _norm(p, "norm", [_expert_of(config, "l")], x[[first_text + position]], config)[0]
            logits = p["heads.mlm.weight"] @ h + p["heads.mlm.bias"]
            sums[language_term] = sums[language_term] + torch.logsumexp(logits, 0) - logits[target]
    return torch.stack(sums)


def _unpack(batch: PackedBatch) -> list[dict]:
    samples: list[dict] = []
    codes = iter(batch.targets["visual_codes"].tolist())
    token_targets = dict(
        zip(batch.targets["masked_tokens"].tolist(), batch.targets["target_ids"].tolist(), strict=True)
    )
    for i in range(batch.num_images + batch.num_pairs):
        targets = {n: next(codes) for n in range(batch.patch_mask.shape[1]) if batch.patch_mask[i, n]}
        modality = "image" if i < batch.num_images else "pair"
        samples.append(
            {"modality": modality, "pixels": batch.pixels[i].double(), "patch_targets": targets, "token_targets": {}}
        )
    start = 0
    for i, length in enumerate([*batch.caption_lengths, *batch.text_lengths]):
        if i < batch.num_pairs:
            sample = samples[batch.num_images + i]
        else:
            sample = {"modality": "text", "patch_targets": {}}
            samples.append(sample)
        sample["ids"] = batch.token_ids[start : start + length]
        sample["token_targets"] = {j: token_targets[start + j] for j in range(length) if start + j in token_targets}
        start += length
    return samples


def _factors(batch: PackedBatch, number: int, layer: int) -> tuple[float, float]:
    if batch.drop_path is None:
        return 1.0, 1.0
    return float(batch.drop_path[number, layer, 0]), float(batch.drop_path[number, layer, 1])


def _embed(p: Parameters, config: ModelConfig, sample: dict, width: int) -> tuple[Tensor, str, Tensor]:
    parts, kind = [], ""
    if "pixels" in sample:
        size = config.patch_size
        rows = [p["embeddings.cls_token"]]
        for n in range(config.num_patches):
            top, left = n // config.grid_size * size, n % config.grid_size * size
            patch = sample["pixels"][:, top : top + size, left : left + size]
            value = (p["embeddings.patch.weight"] * patch).sum((1, 2, 3)) + p["embeddings.patch.bias"]
            rows.append(p["embeddings.mask_token"] if n in sample["patch_targets"] else value)
        parts.append(torch.stack(rows) + p["embeddings.image_position"])
        kind += "v" * len(rows)
    if "ids" in sample:
        length = len(sample["ids"])
        parts.append(p["embeddings.word.weight"][sample["ids"]] + p["embeddings.text_position"][:length])
        kind += "l" * length
    x = torch.cat(parts)
    real = torch.arange(width) < len(x)
    kind += "v" * (width - len(x))  # padding may go through any expert, because no row attends to it
    return F.pad(x, (0, 0, 0, width - len(x)), value=7.0), kind, real


def _block(
    p: Parameters,
    config: ModelConfig,
    layer: int,
    x: Tensor,
    kind: str,
    seen: Tensor,
    modality: str,
    factors: tuple[float, float],
) -> Tensor:
    name = f"blocks.{layer}.attention"
    experts = [_expert_of(config, k) for k in kind]
    h = _norm(p, f"{name}.norm", experts, x, config)
    q, k, v = (_linear(p, f"{name}.{proj}", experts, h) for proj in ("q_proj", "k_proj", "v_proj"))
    outputs = []
    for head in range(config.num_attention_heads):
        columns = slice(head * config.head_size, (head + 1) * config.head_size)
        scores = q[:, columns] @ k[:, columns].T / math.sqrt(config.head_size)
        weights = scores.masked_fill(~seen, -math.inf).softmax(1)
        outputs.append(weights @ v[:, columns])
    y = torch.cat(outputs, dim=1)
    if config.sub_layernorm:
        y = _norm(p, f"{name}.sub_norm", experts, y, config)
    x = x + factors[0] * _linear(p, f"{name}.out_proj", experts, y)

    name = f"blocks.{layer}.ffn"
    top = layer >= config.num_layers - config.num_vision_language_layers
    long_names = {"v": "vision", "l": "language"}
    experts = ["vision_language" if top and modality == "pair" else long_names[k] for k in kind]
    h = _norm(p, f"{name}.norm", experts, x, config)
    h = _linear(p, f"{name}.fc1", experts, h)
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    if config.sub_layernorm:
        h = _norm(p, f"{name}.sub_norm", experts, h, config)
    return x + factors[1] * _linear(p, f"{name}.fc2", experts, h)


def _expert_of(config: ModelConfig, kind: str) -> str:
    if config.layout == "shared":
        return "shared"
    return "vision" if kind == "v" else "language"


def _linear(p: Parameters, name: str, experts: list[str], x: Tensor) -> Tensor:
    weights, biases = (torch.stack([p[f"{name}.{kind}_{e}"] for e in experts]) for kind in ("weight", "bias"))
    return torch.einsum("sfd,sd->sf", weights, x) + biases  # one matrix per row


def _norm(p: Parameters, name: str, experts: list[str], x: Tensor, config: ModelConfig) -> Tensor:
    weights, biases = (torch.stack([p[f"{name}.{kind}_{e}"] for e in experts]) for kind in ("weight", "bias"))
    centered = x - x.mean(1, keepdim=True)
    scaled = centered / torch.sqrt((centered**2).mean(1, keepdim=True) + config.layer_norm_epsilon)
    return scaled * weights + biases
