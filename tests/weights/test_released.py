"""Tests the import of released BEiT-3 weights on files with the released names."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from beit3_ds.config import MODEL_SIZES, ConfigError, ModelConfig
from beit3_ds.model.pretrained import PretrainedWeights
from beit3_ds.tasks.pretraining.model import PretrainingModel
from beit3_ds.weights.export import export_weights
from beit3_ds.weights.released import ReleasedFile
from beit3_ds.weights.unilm_names import read_architecture, reference_arguments
from tests.torchscale_reference import Reference
from tests.weights.models import random_inputs
from tests.weights.test_unilm_export import reference_features

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=128,
    ffn_hidden_size=96,
    num_attention_heads=2,  # 64 features each, as released
    patch_size=4,
    image_size=12,
    layout="decoupled",
    num_vision_language_layers=0,
    sub_layernorm=True,
    text_vocab_size=40,
    visual_vocab_size=30,
    max_text_length=1022,
)
D = CONFIG.hidden_size
# What unilm/beit3 puts beside `beit3.*` for each kind of file, and what it leaves out of a pretraining file.
VARIANTS: dict[str, tuple[dict[str, tuple[int, ...]], tuple[str, ...]]] = {
    "pretrained": ({}, ()),
    "itc": ({"language_head.weight": (D, D), "vision_head.weight": (D, D), "logit_scale": ()}, ("mlm_", "mim_")),
    "captioning": ({}, ("mim_head",)),
    "vqa": (
        {"pooler.norm.weight": (D,), "pooler.norm.bias": (D,), "pooler.dense.weight": (D, D), "pooler.dense.bias": (D,)}
        | {"head.0.weight": (2 * D, D), "head.0.bias": (2 * D,), "head.1.weight": (2 * D,), "head.1.bias": (2 * D,)}
        | {"head.3.weight": (7, 2 * D), "head.3.bias": (7,)},
        ("mlm_", "mim_", "beit3.encoder.layer_norm"),
    ),
    "nlvr2": (
        {"head.norm1.weight": (4 * D,), "head.norm1.bias": (4 * D,), "head.dense1.weight": (2 * D, 4 * D)}
        | {"head.dense1.bias": (2 * D,), "head.norm2.weight": (2 * D,), "head.norm2.bias": (2 * D,)}
        | {"head.dense2.weight": (2, 2 * D), "head.dense2.bias": (2,)},
        ("mlm_", "mim_"),
    ),
    "imagenet": (
        {"fc_norm.weight": (D,), "fc_norm.bias": (D,), "head.weight": (9, D), "head.bias": (9,)},
        ("mlm_", "mim_", "beit3.encoder.layer_norm"),
    ),
}
TASKS = {"pretrained": "pretraining", "itc": "retrieval", "captioning": "captioning"} | {
    task: task for task in ("vqa", "nlvr2", "imagenet")
}


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(reference_arguments(CONFIG), CONFIG.visual_vocab_size).eval().randomize()


def released_state(reference: Reference, variant: str) -> dict[str, Tensor]:
    heads, absent = VARIANTS[variant]
    generator = torch.Generator().manual_seed(3)
    state = {key: value for key, value in reference.state_dict().items() if not key.startswith(absent)}
    return state | {key: torch.randn(shape, generator=generator) for key, shape in heads.items()}


def write(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(task="vqav2")}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_imported_and_exported_files_are_identical(
    reference: Reference, variant: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    state = {key: value.to(dtype) for key, value in released_state(reference, variant).items()}
    state["steps"] = torch.tensor(4)  # an integer stays one
    imported, back = tmp_path / "imported.safetensors", tmp_path / "back.pth"
    reader = ReleasedFile(write(tmp_path / "released.pth", state))
    num_codes = CONFIG.visual_vocab_size if "mim_head.bias" in state else ModelConfig.visual_vocab_size
    final_norm = any("encoder.layer_norm" in key for key in state)
    assert reader.model == dataclasses.replace(CONFIG, visual_vocab_size=num_codes, final_norm=final_norm)
    assert reader.task["name"] == TASKS[variant]
    export_weights(reader, imported)
    export_weights(PretrainedWeights(imported), back, format="unilm-dual")
    returned = torch.load(back, weights_only=True)["model"]
    assert returned.keys() == state.keys()
    for key, value in state.items():
        assert returned[key].dtype == value.dtype and torch.equal(returned[key], value), key
        assert returned[key].shape == value.shape, key


def test_integers_are_not_cast(reference: Reference, tmp_path: Path) -> None:
    path = write(tmp_path / "released.pth", released_state(reference, "itc") | {"steps": torch.tensor(1 << 40)})
    export_weights(ReleasedFile(path), tmp_path / "imported.safetensors", dtype=torch.float16)
    weights = PretrainedWeights(tmp_path / "imported.safetensors")
    assert weights.dtype("released.logit_scale") == torch.float16
    assert weights.read("released.steps") == 1 << 40


@torch.no_grad()
def test_the_imported_model_computes_what_the_reference_does(reference: Reference, tmp_path: Path) -> None:
    path = write(tmp_path / "released.pth", released_state(reference, "pretrained"))
    export_weights(ReleasedFile(path), tmp_path / "imported.safetensors")
    model = PretrainingModel.from_pretrained(tmp_path / "imported.safetensors")
    inputs = random_inputs(CONFIG)
    ours, theirs = model.encode(*inputs), reference_features(reference, *inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_missing_heads_get_initial_values_and_a_warning(reference: Reference, tmp_path: Path) -> None:
    path = write(tmp_path / "released.pth", released_state(reference, "vqa"))
    export_weights(ReleasedFile(path), tmp_path / "imported.safetensors")
    names = r"heads\.mim\.weight.*heads\.mlm\.bias.*initial values"
    with pytest.warns(UserWarning, match=names) as caught:
        model = PretrainingModel.from_pretrained(tmp_path / "imported.safetensors")
    assert caught[0].filename == __file__  # points at the caller
    assert model.norm is None and not model.heads.mlm.bias.any()
    assert 0 < model.heads.mlm.weight.std() < 0.02  # catches uninitialised memory
    with pytest.raises(ConfigError, match="without a final norm"):
        export_weights(PretrainedWeights(tmp_path / "imported.safetensors"), tmp_path / "x.safetensors", format="timm")


@pytest.mark.parametrize("size", [8, 20])
def test_positions_are_interpolated_as_for_fine_tuning(reference: Reference, size: int, tmp_path: Path) -> None:
    state = released_state(reference, "pretrained")
    export_weights(ReleasedFile(write(tmp_path / "a.pth", state), image_size=size), tmp_path / "imported.safetensors")
    weights = PretrainedWeights(tmp_path / "imported.safetensors")
    table = state["beit3.encoder.embed_positions.A.weight"]
    grid = table[3:].reshape(1, 3, 3, D).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(size // 4, size // 4), mode="bicubic", align_corners=False)
    expected = torch.cat([table[2:3], grid.permute(0, 2, 3, 1).flatten(0, 2)])
    torch.testing.assert_close(weights.read("embeddings.image_position"), expected)
    assert weights.model.image_size == size
    images, texts, pairs = random_inputs(weights.model)
    assert PretrainingModel.from_pretrained(weights.path).encode(images, texts, pairs).images.shape == (
        2,
        1 + (size // 4) ** 2,
        D,
    )


@pytest.mark.parametrize(("size", "millions"), [("base", 276.51), ("large", 746.71)])  # as its authors count
def test_the_released_sizes_are_read_off_their_shapes(size: str, millions: float) -> None:
    config = ModelConfig(
        **MODEL_SIZES[size],
        layout="decoupled",
        num_vision_language_layers=0,
        sub_layernorm=True,
        max_text_length=1022,
    )
    with torch.device("meta"):
        state = Reference(reference_arguments(config), config.visual_vocab_size).state_dict()
        ours = sum(parameter.numel() for parameter in PretrainingModel(config).parameters())
    assert read_architecture({key: value.shape for key, value in state.items()}, "file") == config
    theirs = sum(value.numel() for value in state.values())
    assert round(theirs / 1e6, 2) == millions
    assert theirs - ours == 4 * config.hidden_size  # two unused rows of each position table


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_with_a_wrong_tensor_is_refused(data: st.DataObject, reference: Reference, tmp_path: Path) -> None:
    """Checks that a file is refused if any tensor is missing or has a wrong name or shape."""
    state = released_state(reference, "pretrained")
    key = data.draw(st.sampled_from([key for key in state if key.startswith("beit3.")]))
    change = data.draw(st.sampled_from(["lose", "rename", "widen", "flatten"]))
    if change == "rename":
        state[f"{key}.C"] = state.pop(key)
    elif change == "widen":
        state[key] = torch.cat([state[key], state[key]], dim=-1)
    elif change == "flatten" or key.startswith("beit3.encoder.layer_norm"):  # which fine-tuned files may lack
        state[key] = state[key].flatten()[:-1]
    else:
        del state[key]
    with pytest.raises(ConfigError):
        ReleasedFile(write(tmp_path / "released.pth", state))


def test_other_files_are_refused(reference: Reference, tmp_path: Path) -> None:
    state = released_state(reference, "pretrained")
    with pytest.raises(ConfigError, match="not BEiT-3 in its released format"):
        ReleasedFile(write(tmp_path / "other.pth", {"weight": torch.ones(2)}))
    table = state["beit3.encoder.embed_positions.A.weight"]
    with pytest.raises(ConfigError, match="do not form a square grid"):
        ReleasedFile(write(tmp_path / "grid.pth", state | {"beit3.encoder.embed_positions.A.weight": table[:-1]}))
    with pytest.raises(ConfigError, match=r"1 tensors of the backbone.*relative_position"):
        ReleasedFile(write(tmp_path / "more.pth", state | {"beit3.encoder.relative_position.weight": torch.ones(3)}))
    narrow = {key: value[..., :100] for key, value in state.items()}
    with pytest.raises(ConfigError, match="does not state the number of attention heads"):
        ReleasedFile(write(tmp_path / "narrow.pth", narrow))
    with pytest.raises(ConfigError, match=r"patch_size=4 does not divide image_size=13"):
        ReleasedFile(write(tmp_path / "released.pth", state), image_size=13)
