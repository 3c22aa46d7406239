"""Compares the decoupled layout with the code of the released models (torchscale 0.3.0, MIT)."""

import dataclasses
from typing import Any

import pytest
import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model import BEiT3, initialize_parameters
from beit3_ds.tasks.pretraining.model import PretrainingModel
from tests.batches import decoupled, random_batch
from tests.torchscale_reference import build_torchscale

CONFIG = decoupled(num_layers=4, hidden_size=48, ffn_hidden_size=96, num_attention_heads=4)


@pytest.fixture(scope="module")
def reference() -> Any:
    arguments = {
        "img_size": CONFIG.image_size,
        "patch_size": CONFIG.patch_size,
        "vocab_size": CONFIG.text_vocab_size,
        "multiway": True,
        "layernorm_embedding": False,
        "normalize_output": True,
        "no_output_layer": True,
        "encoder_embed_dim": CONFIG.hidden_size,
        "encoder_attention_heads": CONFIG.num_attention_heads,
        "encoder_ffn_embed_dim": CONFIG.ffn_hidden_size,
        "encoder_layers": CONFIG.num_layers,
        "max_source_positions": CONFIG.max_text_length + 2,
    }
    return build_torchscale(arguments)


def reference_state(model: BEiT3, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Returns this project's parameters under the reference's names, where A is vision and B is language."""
    ours = {name: p.detach() for name, p in model.named_parameters()}
    two_unused = torch.zeros(2, config.hidden_size)
    state = {
        "text_embed.weight": ours["embeddings.word.weight"],
        "vision_embed.proj.weight": ours["embeddings.patch.weight"],
        "vision_embed.proj.bias": ours["embeddings.patch.bias"],
        "vision_embed.cls_token": ours["embeddings.cls_token"].view(1, 1, -1),
        "vision_embed.mask_token": ours["embeddings.mask_token"].view(1, 1, -1),
        "encoder.embed_positions.A.weight": torch.cat([two_unused, ours["embeddings.image_position"]]),
        "encoder.embed_positions.B.weight": torch.cat([two_unused, ours["embeddings.text_position"]]),
    }
    modules = {
        "attention.norm": "self_attn_layer_norm.{X}",
        "attention.q_proj": "self_attn.q_proj.{X}",
        "attention.k_proj": "self_attn.k_proj.{X}",
        "attention.v_proj": "self_attn.v_proj.{X}",
        "attention.sub_norm": "self_attn.inner_attn_ln.{X}",
        "attention.out_proj": "self_attn.out_proj.{X}",
        "ffn.norm": "final_layer_norm.{X}",
        "ffn.fc1": "ffn.{X}.fc1",
        "ffn.sub_norm": "ffn.{X}.ffn_layernorm",
        "ffn.fc2": "ffn.{X}.fc2",
    }
    for letter, expert in (("A", "vision"), ("B", "language")):
        for kind in ("weight", "bias"):
            state[f"encoder.layer_norm.{letter}.{kind}"] = ours[f"norm.{kind}_{expert}"]
            for layer in range(config.num_layers):
                for mine, theirs in modules.items():
                    key = f"encoder.layers.{layer}.{theirs.format(X=letter)}.{kind}"
                    state[key] = ours[f"blocks.{layer}.{mine}.{kind}_{expert}"]
    return state


def packed_features(model: BEiT3, batch: PackedBatch) -> torch.Tensor:
    return model.run_layers(dataclasses.replace(batch, head_rows=None, head_row_counts=()))


@pytest.mark.parametrize("kind", ["image", "text", "pair"])
@torch.no_grad()
def test_parity(reference: Any, kind: str) -> None:
    model = PretrainingModel(CONFIG)
    initialize_parameters(model, CONFIG, seed=5)
    for i, parameter in enumerate(model.parameters()):  # norms and biases differ from 1 and 0
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    reference.load_state_dict(reference_state(model, CONFIG), strict=True)

    batch = random_batch(CONFIG, **{"num_images": 0, "num_pairs": 0, "num_texts": 0, f"num_{kind}s": 3})
    lengths = [*batch.caption_lengths, *batch.text_lengths]
    inputs: dict[str, torch.Tensor] = {}
    if kind != "text":
        inputs["visual_tokens"] = batch.pixels
        inputs["vision_masked_position"] = batch.patch_mask
    if kind != "image":
        ids = batch.token_ids.split(lengths)
        inputs["textual_tokens"] = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=1)
        inputs["text_padding_position"] = torch.arange(max(lengths)) >= torch.tensor(lengths).unsqueeze(1)
    expected = reference(**inputs)["encoder_out"]
    expected = expected if expected.shape[0] == 3 else expected.transpose(0, 1)

    packed = packed_features(model, batch)
    for i, ranges in enumerate(batch.sequence_ranges):
        ours = torch.cat([packed[start:stop] for start, stop in ranges])
        torch.testing.assert_close(ours, expected[i, : len(ours)], rtol=1e-5, atol=1e-5)
