"""Tests the import of BEiT v2's released tokenizers, on tensors with the released names and shapes."""

import argparse
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.config import ConfigError
from beit3_ds.tokenizers import VisualTokenizer, import_released_tokenizer, load_visual_tokenizer, save_visual_tokenizer
from beit3_ds.tokenizers.released import convert_released_state

SMALL = {"hidden": 128, "encoder_layers": 2, "decoder_layers": 1, "codes": 32, "code_dim": 8, "grid": 3, "patch": 8}
BASE = {"hidden": 768, "encoder_layers": 12, "decoder_layers": 3, "codes": 8192, "code_dim": 32, "grid": 14}


def transformer_state(
    name: str, layers: int, hidden: int, channels: int, patch: int, grid: int, device: str
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(layers) if device == "cpu" else None

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator) * 0.05

    state = {
        "cls_token": draw(1, 1, hidden),
        "pos_embed": draw(1, grid**2 + 1, hidden),
        "patch_embed.proj.weight": draw(hidden, channels, patch, patch),
        "patch_embed.proj.bias": draw(hidden),
        "fc_norm.weight": 1 + draw(hidden),
        "fc_norm.bias": draw(hidden),
    }
    for layer in range(layers):
        block = f"blocks.{layer}"
        for norm in ("norm1", "norm2"):
            state |= {f"{block}.{norm}.weight": 1 + draw(hidden), f"{block}.{norm}.bias": draw(hidden)}
        state |= {f"{block}.attn.q_bias": draw(hidden), f"{block}.attn.v_bias": draw(hidden)}
        state |= {f"{block}.attn.qkv.weight": draw(3 * hidden, hidden)}
        for linear, rows, columns in (
            ("attn.proj", hidden, hidden),
            ("mlp.fc1", 4 * hidden, hidden),
            ("mlp.fc2", hidden, 4 * hidden),
        ):
            state |= {f"{block}.{linear}.weight": draw(rows, columns), f"{block}.{linear}.bias": draw(rows)}
    return {f"{name}.{key}": value for key, value in state.items()}


def released_state(
    hidden: int,
    encoder_layers: int,
    decoder_layers: int,
    codes: int,
    code_dim: int,
    grid: int,
    patch: int = 16,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Returns the tensors of VQKD.state_dict().

    They are those of two transformers, the quantizer, two task layers, and CLIP's scaling layer.
    """
    state = transformer_state("encoder", encoder_layers, hidden, 3, patch, grid, device)
    state |= transformer_state("decoder", decoder_layers, hidden, code_dim, 1, grid, device)
    generator = torch.Generator(device=device).manual_seed(3) if device == "cpu" else None
    codebook = F.normalize(torch.randn(codes, code_dim, device=device, generator=generator), dim=-1)
    state |= {
        "quantize.cluster_size": torch.ones(codes, device=device),
        "quantize.embedding.weight": codebook,
        "quantize.embedding.cluster_size": torch.zeros(codes, device=device),
        "quantize.embedding.embed_avg": codebook.clone(),
        "quantize.embedding.initted": torch.ones(1, device=device),
        "scaling_layer.shift": torch.zeros(1, 3, 1, 1, device=device),
        "scaling_layer.scale": torch.ones(1, 3, 1, 1, device=device),
    }
    for name, width in (("encode_task_layer", code_dim), ("decode_task_layer", 512)):
        for index, rows in ((0, hidden), (2, width)):
            weight = torch.randn(rows, hidden, device=device, generator=generator) * 0.1
            state |= {f"{name}.{index}.weight": weight, f"{name}.{index}.bias": weight[:, 0].clone()}
    return state


def released_codes(state: dict[str, Tensor], pixels: Tensor, heads: int) -> Tensor:
    """Computes the codes of images by the published formulas, with tensors under the released names."""
    s = {name.removeprefix("encoder."): value for name, value in state.items()}
    hidden, _, patch, _ = s["patch_embed.proj.weight"].shape
    x = F.conv2d(pixels, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], patch).flatten(2).transpose(1, 2)
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], dim=1) + s["pos_embed"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (hidden,), s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])

    for block in (f"blocks.{layer}" for layer in range(2)):
        q, k, v = F.linear(norm(x, f"{block}.norm1"), s[f"{block}.attn.qkv.weight"]).chunk(3, dim=-1)
        q, v = q + s[f"{block}.attn.q_bias"], v + s[f"{block}.attn.v_bias"]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        attention = (q @ k.transpose(-1, -2) / (hidden // heads) ** 0.5).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    features = norm(x[:, 1:], "fc_norm")
    vectors = F.normalize(linear(torch.tanh(linear(features, "encode_task_layer.0")), "encode_task_layer.2"), dim=-1)
    return torch.cdist(vectors, s["quantize.embedding.weight"]).argmin(-1)


def write(folder: Path, state: dict[str, Tensor]) -> Path:
    path = folder / "released.pth"
    torch.save({"model": state, "epoch": 99, "args": argparse.Namespace(codebook_n_emd=32)}, path)
    return path


def test_imported_tokenizer_gives_the_released_codes(tmp_path: Path) -> None:
    state, pixels = released_state(**SMALL), torch.rand(16, 3, 24, 24) * 2 - 1
    tokenizer = import_released_tokenizer(write(tmp_path, state), tmp_path / "visual.safetensors")
    codes = tokenizer.encode(pixels)
    assert torch.equal(codes, released_codes(state, pixels, heads=2))  # catches a bias on keys, a lost norm, scaling
    assert len(codes.unique()) > 8
    save_visual_tokenizer(tokenizer.config.path, tokenizer)
    loaded = load_visual_tokenizer(tokenizer.config.path)
    assert torch.equal(loaded.encode(pixels), codes)
    assert "open_clip:ViT-B-16" in loaded.teacher_description


@pytest.mark.parametrize(("image_size", "num_positions"), [(None, 197), (256, 257)])
def test_the_base_tokenizer_fits_in_every_name_and_shape(image_size: int | None, num_positions: int) -> None:
    state = released_state(**BASE, device="meta")
    config, converted = convert_released_state(state, "x", image_size=image_size)
    assert (config.num_layers, config.decoder_layers, config.num_attention_heads) == (12, 3, 12)
    with torch.device("meta"):
        wanted = VisualTokenizer(config, teacher_width=512).state_dict()
    assert {name: value.shape for name, value in converted.items()} == {n: v.shape for n, v in wanted.items()}
    assert converted["encoder.pos_embed"].shape[1] == converted["decoder.pos_embed"].shape[1] == num_positions


def test_other_files_are_refused(tmp_path: Path) -> None:
    state = released_state(**SMALL)
    untrained = state | {"quantize.embedding.initted": torch.zeros(1)}
    with pytest.raises(ConfigError, match="codebook was never initialised"):
        import_released_tokenizer(write(tmp_path, untrained), "x")
    outside = state | {"quantize.embedding.weight": 2 * state["quantize.embedding.weight"]}
    with pytest.raises(ConfigError, match=r"codes have lengths from 2\.000 to 2\.000"):
        import_released_tokenizer(write(tmp_path, outside), "x")
    with pytest.raises(ConfigError, match=r"(?s)not a VQ-KD tokenizer.*0\.gamma_1"):  # layer scale: another network
        import_released_tokenizer(write(tmp_path, state | {"encoder.blocks.0.gamma_1": torch.ones(128)}), "x")
    with pytest.raises(ConfigError, match="not a VQ-KD tokenizer"):
        import_released_tokenizer(write(tmp_path, {"head.weight": torch.ones(2)}), "x")
    (tmp_path / "text.pth").write_text("no tensors here")
    with pytest.raises(ConfigError, match="cannot be read"):
        import_released_tokenizer(tmp_path / "text.pth", "x")
