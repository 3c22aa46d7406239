"""Tests exported vision towers in timm."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from beit3_ds.config import MODEL_SIZES, ConfigError, ModelConfig
from beit3_ds.model import BEiT3
from beit3_ds.preprocess import preprocess
from beit3_ds.weights.export import export_weights, loading_hint
from beit3_ds.weights.timm_export import timm_arguments
from tests.batches import decoupled, small_model_config
from tests.weights.models import ModelReader, random_inputs, random_model

LAYOUTS = {
    "paper": small_model_config(),
    "paper-sub-ln": small_model_config(sub_layernorm=True, ffn_hidden_size=41),  # 41/24 rounds down to 40
    "decoupled": decoupled(),
}


@torch.no_grad()
def assert_timm_computes_ours(model: BEiT3, path: Path, arguments: dict[str, Any]) -> None:
    import timm  # takes two seconds, which collecting the tests need not wait for

    tower = timm.create_model(**arguments, checkpoint_path=str(path)).eval()  # strict: every name and shape
    images, _, _ = random_inputs(model.config)
    ours, features = model.encode(images).images, tower.forward_features(images)
    expert = model.config.attention_experts[0]
    weight, bias = (getattr(model.norm, f"{kind}_{expert}") for kind in ("weight", "bias"))
    torch.testing.assert_close(F.layer_norm(features, weight.shape, weight, bias, 1e-5), ours, rtol=1e-5, atol=1e-5)
    pooled = F.layer_norm(features[:, 1:].mean(1), weight.shape, weight, bias, 1e-5)
    torch.testing.assert_close(tower(images), pooled, rtol=1e-5, atol=1e-5)  # its fc_norm is our final norm


@pytest.mark.parametrize("layout", LAYOUTS)
def test_timm_computes_our_features(layout: str, tmp_path: Path) -> None:
    model, path = random_model(LAYOUTS[layout]), tmp_path / "vision.safetensors"
    export_weights(ModelReader(model), path, format="timm")
    assert_timm_computes_ours(model, path, timm_arguments(model.config))


def test_the_base_model_has_a_name_in_timm(tmp_path: Path) -> None:
    vocabularies = {"text_vocab_size": 8, "visual_vocab_size": 8}  # of which vision has no use
    config = ModelConfig(**MODEL_SIZES["base"], **vocabularies, sub_layernorm=True, num_vision_language_layers=0)
    model, path = random_model(config), tmp_path / "vision.safetensors"
    export_weights(ModelReader(model), path, format="timm")
    assert_timm_computes_ours(model, path, {"model_name": "beit3_base_patch16_224", "num_classes": 0})


@pytest.mark.parametrize("size", ["base", "large", "giant"])
def test_named_sizes_need_no_more_than_their_name(size: str) -> None:
    import timm

    sub_ln = ModelConfig(**MODEL_SIZES[size], sub_layernorm=True)
    assert timm_arguments(sub_ln).keys() == {"model_name", "num_classes"}
    assert timm_arguments(ModelConfig(**MODEL_SIZES[size], image_size=448)) == timm_arguments(sub_ln) | {
        "img_size": 448,
        "scale_attn_norm": False,
        "scale_mlp_norm": False,
    }
    with torch.device("meta"):
        tower = timm.create_model(**timm_arguments(sub_ln))
    assert tower.blocks[0].mlp.fc1.out_features == sub_ln.ffn_hidden_size
    assert len(tower.blocks) == sub_ln.num_layers and tower.patch_embed.patch_size[0] == sub_ln.patch_size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_printed_example_gives_our_features(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a printed example that stops before the final norm or preprocesses images differently."""
    monkeypatch.chdir(tmp_path)
    model, path = random_model(LAYOUTS[layout]), tmp_path / "vision.safetensors"
    export_weights(ModelReader(model), path, format="timm")
    Image.effect_noise((90, 60), 80).convert("RGB").save("photo.jpg")
    lines = loading_hint(model.config, path, "timm").splitlines()
    example = lines[1:-1]
    assert example[0] == "import timm" and example[-1].startswith("features = ")
    names: dict[str, Any] = {}
    exec("\n".join(example), names)
    with torch.no_grad():
        ours = model.encode(images=preprocess("photo.jpg", model.config.image_size)[None]).images
        torch.testing.assert_close(names["features"], ours, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            names["model"](names["images"]),
            names["model"].fc_norm(names["model"].forward_features(names["images"])[:, 1:].mean(1)),
            rtol=1e-5,
            atol=1e-5,
        )


def test_other_norms_are_refused(tmp_path: Path) -> None:
    model = random_model(small_model_config(layer_norm_epsilon=1e-6))
    with pytest.raises(ConfigError, match="layer_norm_epsilon=1e-06"):
        export_weights(ModelReader(model), tmp_path / "x.safetensors", format="timm")
