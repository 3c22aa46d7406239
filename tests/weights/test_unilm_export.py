"""Tests that the reference's own code computes this project's features from exported state dicts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_ds.config import ConfigError
from beit3_ds.model import BEiT3, Features
from beit3_ds.weights.export import ExportFormat, export_weights, loading_hint
from beit3_ds.weights.export_note import NOTE_KEY
from beit3_ds.weights.unilm_names import reference_arguments
from tests.batches import decoupled, small_model_config
from tests.torchscale_reference import Reference
from tests.weights.models import ModelReader, random_inputs, random_model

LAYOUTS = {
    "paper": small_model_config(),
    "paper-sub-ln-tied": small_model_config(sub_layernorm=True, tie_word_embeddings=True),
    "no-vl": small_model_config(num_vision_language_layers=0),
    "decoupled": decoupled(),
}


def load_reference(model: BEiT3, path: Path, format: ExportFormat) -> Reference:
    export_weights(ModelReader(model), path, format=format)
    reference = Reference(reference_arguments(model.config), model.config.visual_vocab_size)
    state = torch.load(path, weights_only=True)
    assert state.keys() == {"model", NOTE_KEY}  # its loader reads the first
    reference.load_state_dict(state["model"], strict=True)  # every name and shape of the reference
    return reference.eval()


def reference_features(reference: Any, images: Any, texts: Any, pairs: Any) -> Features:
    """Returns the reference's features, computed for one sample at a time without padding."""

    def run(**inputs: torch.Tensor) -> torch.Tensor:
        out = reference.beit3(**{name: value.unsqueeze(0) for name, value in inputs.items()})["encoder_out"]
        return out.flatten(0, 1)  # (1, T, D) or (T, 1, D)

    both = [run(visual_tokens=x, textual_tokens=ids) for x, ids in zip(*pairs, strict=True)]
    length = reference.beit3.vision_embed.num_position_embeddings()
    return Features(
        torch.stack([run(visual_tokens=x) for x in images]),
        tuple(run(textual_tokens=ids) for ids in texts),
        torch.stack([h[:length] for h in both]),
        tuple(h[length:] for h in both),
    )


@pytest.mark.parametrize("format", ["unilm-dual", "unilm-fusion"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_reference_computes_our_features(layout: str, format: ExportFormat, tmp_path: Path) -> None:
    model = random_model(LAYOUTS[layout])
    config = model.config
    has_experts = config.num_vision_language_layers > 0
    if format == "unilm-fusion" and not has_experts:
        with pytest.raises(ConfigError, match="no vision-language expert"):
            export_weights(ModelReader(model), tmp_path / "weights.pth", format=format)
        assert list(tmp_path.iterdir()) == []
        return
    reference = load_reference(model, tmp_path / "weights.pth", format)
    inputs = random_inputs(config, num_images=2, text_lengths=(5, 2), caption_lengths=(4, 7))
    ours, theirs = model.encode(*inputs), reference_features(reference, *inputs)
    alone = [(ours.images, theirs.images), *zip(ours.texts, theirs.texts, strict=True)]
    paired = [(ours.pair_images, theirs.pair_images), *zip(ours.pair_texts, theirs.pair_texts, strict=True)]
    exact = {"unilm-dual": alone + (paired if not has_experts else []), "unilm-fusion": paired}[format]
    for one, other in exact:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    if has_experts:  # the other kind needs the other file: catches an expert that is written into both
        for one, other in {"unilm-dual": paired, "unilm-fusion": alone}[format]:
            assert (one - other).abs().max() > 0.01
    torch.testing.assert_close(reference.mlm_head(ours.texts[0]), model.heads.mlm.logits(ours.texts[0]))
    torch.testing.assert_close(reference.mim_head(ours.images[0]), model.heads.mim.logits(ours.images[0]))


def test_long_tables_keep_their_rows(tmp_path: Path) -> None:
    config = small_model_config(max_text_length=1100)  # longer than the reference's 1024
    model = random_model(config)
    reference = load_reference(model, tmp_path / "weights.pth", "unilm-dual")
    table = reference.beit3.encoder.embed_positions.B.weight
    torch.testing.assert_close(table[2:], model.embeddings.text_position, rtol=0, atol=0)
    assert not table[:2].any()


@pytest.mark.parametrize("format", ["unilm-dual", "unilm-fusion"])
def test_the_hint_says_how_to_build_the_reference(format: ExportFormat) -> None:
    hint = loading_hint(small_model_config(), Path("x.pth"), format)
    arguments = eval("dict" + hint[hint.index("(") : hint.index(")") + 1])
    assert Reference(arguments, 30).beit3.encoder.layers[0].self_attn.inner_attn_ln is None
    other = {"unilm-dual": "unilm-fusion", "unilm-fusion": "unilm-dual"}[format]
    assert f"--format {other}" in hint and "subln=False is needed" in hint
    assert len(loading_hint(decoupled(), Path("x.pth"), "unilm-dual").splitlines()) == 1  # nothing to heed
