"""Tests that weights adapted to other settings compute the same outputs, as far as possible."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beit3_ds.config import ConfigError, ModelConfig
from beit3_ds.model import BEiT3, PretrainedWeights, initial_value
from beit3_ds.model.adaptation import AdaptedWeights, fill_parameters
from beit3_ds.tasks.pretraining.model import PretrainingModel
from tests.batches import decoupled, random_batch, small_model_config
from tests.weights.models import assert_features_equal, exported, random_inputs, random_model

SHARED = small_model_config(num_vision_language_layers=0, sub_layernorm=True)
PAPER = small_model_config()  # a vision-language expert in the top one of three blocks


def features_of(model: BEiT3, config: ModelConfig) -> Any:
    with torch.no_grad():
        return model.encode(*random_inputs(config))


def changes(stored: ModelConfig, path: Path, **wanted: Any) -> list[str]:
    return AdaptedWeights(PretrainedWeights(path), dataclasses.replace(stored, **wanted), "x").changes


def test_shared_becomes_decoupled_with_the_same_outputs(tmp_path: Path) -> None:
    model = random_model(SHARED)
    path = exported(model, tmp_path / "w")
    loaded = PretrainingModel.from_pretrained(path, layout="decoupled")
    assert loaded.config == dataclasses.replace(SHARED, layout="decoupled")
    assert_features_equal(features_of(loaded, SHARED), features_of(model, SHARED), 1e-6)
    norm = loaded.norm
    assert torch.equal(norm.weight_vision, norm.weight_language) and norm.weight_vision is not norm.weight_language
    assert changes(SHARED, path, layout="decoupled") == ["shared attention and norms copied for vision and language"]


def test_decoupling_leaves_vision_language_experts_out(tmp_path: Path) -> None:
    """Checks features of images and of texts, which never use a vision-language expert, after it is left out."""
    model = random_model(PAPER)
    path = exported(model, tmp_path / "w")
    wanted = {"layout": "decoupled", "num_vision_language_layers": 0}
    ours, theirs = features_of(PretrainingModel.from_pretrained(path, **wanted), PAPER), features_of(model, PAPER)
    assert_features_equal(
        ours._replace(pair_images=ours.images, pair_texts=()),
        theirs._replace(pair_images=theirs.images, pair_texts=()),
        1e-6,
    )
    assert "vision-language experts of block 2 left out" in changes(PAPER, path, **wanted)[-1]


@pytest.mark.parametrize("stored", [SHARED, PAPER])
def test_new_experts_are_those_of_vision(stored: ModelConfig, tmp_path: Path) -> None:
    model = random_model(stored)
    path = exported(model, tmp_path / "w")
    loaded = PretrainingModel.from_pretrained(path, num_vision_language_layers=3)
    state, old = dict(loaded.named_parameters()), dict(model.named_parameters())
    for name, parameter in state.items():
        source = name if name in old else name.replace("_vision_language", "_vision")
        assert torch.equal(parameter, old[source]), name
    first = 3 - stored.num_vision_language_layers  # existing experts keep their weights
    assert first == 3 or not torch.equal(
        state["blocks.2.ffn.fc1.weight_vision_language"], old["blocks.2.ffn.fc1.weight_vision"]
    )
    ours, theirs = features_of(loaded, stored), features_of(model, stored)
    torch.testing.assert_close((ours.images, ours.texts), (theirs.images, theirs.texts), rtol=1e-6, atol=1e-6)
    (note,) = changes(stored, path, num_vision_language_layers=3)
    assert note.endswith("copied from their vision experts") and f"blocks 0 to {first - 1}" in note


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(2, 60))
def test_other_text_lengths(length: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Checks that learned positions are kept, and that added ones get the initial values of a new run."""
    model = random_model(PAPER)
    path = exported(model, tmp_path_factory.mktemp("w") / "w")
    loaded = PretrainingModel.from_pretrained(path, max_text_length=length)
    table, kept = loaded.embeddings.text_position, min(length, 20)
    assert table.shape == (length, 24) and torch.equal(table[:kept], model.embeddings.text_position[:kept])
    fresh = initial_value("embeddings.text_position", table.shape, loaded.config, 0)
    assert torch.equal(table[kept:], fresh[kept:])
    ids = [0, 5, 2][:length]
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode(texts=[ids]).texts, model.encode(texts=[ids]).texts)
        assert len(loaded.encode(texts=[[3] * length]).texts[0]) == length
    notes = changes(PAPER, path, max_text_length=length)
    assert [note.split()[0] for note in notes] == (["the"] if length < 20 else ["initial"] if length > 20 else [])


def test_several_settings_at_once(tmp_path: Path) -> None:
    path = exported(random_model(SHARED), tmp_path / "w")
    loaded = PretrainingModel.from_pretrained(path, image_size=24, max_text_length=30, layout="decoupled")
    assert features_of(loaded, loaded.config).images.shape == (2, 37, 24)
    assert len(changes(SHARED, path, image_size=24, max_text_length=30, layout="decoupled")) == 3


INPUTS = [("images",), ("texts",), ("pairs",), ("images", "texts"), ("images", "pairs"), ("pairs", "texts")]
LAYOUTS = {"paper": PAPER, "no vision-language experts": SHARED, "decoupled": decoupled()}


def inputs_of(config: ModelConfig, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Returns random inputs of the given kinds only."""
    images, texts, pairs = random_inputs(config)
    return {kind: x for kind, x in {"images": images, "texts": texts, "pairs": pairs}.items() if kind in kinds}


@pytest.mark.parametrize("kinds", INPUTS, ids="+".join)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_what_the_inputs_need_is_loaded(layout: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    """Compares features with those of the whole model bit for bit, and checks which tensors are read."""
    whole = random_model(LAYOUTS[layout])
    weights = PretrainedWeights(exported(whole, tmp_path / "w"))
    loaded = PretrainingModel.from_pretrained(tmp_path / "w", inputs=kinds[::-1])  # in any order
    assert loaded.config == dataclasses.replace(whole.config, inputs=kinds)
    inputs = inputs_of(whole.config, kinds)
    assert_features_equal(loaded.encode(**inputs), whole.encode(**inputs), 0)

    adapted, read = AdaptedWeights(weights, loaded.config, "x"), []
    weights.read = lambda name, part=None, read_one=weights.read: read.append(name) or read_one(name, part)
    fill_parameters(loaded, adapted)
    names = {name for name, _ in loaded.named_parameters()}
    used = used_by(whole, inputs)
    assert set(read) == names and used <= names
    # No model needs the mask token and heads for features; all else that was loaded matters.
    assert {name for name in names - used if not name.startswith("heads.")} <= {"embeddings.mask_token"}


def used_by(model: BEiT3, inputs: dict[str, Any]) -> set[str]:
    """Returns the parameters that the features of the inputs depend on."""
    features = model.encode(**inputs)
    sum(
        x.pow(3).sum() for x in (features.images, features.pair_images, *features.texts, *features.pair_texts)
    ).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def test_missing_experts_are_named(tmp_path: Path) -> None:
    images = exported(random_model(dataclasses.replace(PAPER, inputs=("images",))), tmp_path / "images")
    dual = exported(random_model(dataclasses.replace(PAPER, inputs=("images", "texts"))), tmp_path / "dual")
    with pytest.raises(ConfigError, match=r"model for images alone, without 20 tensors.*for images and texts needs"):
        PretrainingModel.from_pretrained(images, inputs=("images", "texts"))
    with pytest.raises(ConfigError, match=r"without 6 .*norm\.weight_vision_language.*\[\"images\", \"texts\"\]"):
        PretrainingModel.from_pretrained(dual, inputs=("pairs",))
    # Without vision-language experts, a dual encoder has all that pairs need.
    model = PretrainingModel.from_pretrained(dual, inputs=("pairs",), num_vision_language_layers=0)
    assert model.config.inputs == ("pairs",)
    assert changes(PAPER, exported(random_model(PAPER), tmp_path / "w"), inputs=("images",)) == [
        "what only pairs and texts need left out"
    ]
    with pytest.raises(ConfigError, match=r"inputs=tuple \(\) must hold at least one of images, pairs, texts"):
        dataclasses.replace(PAPER, inputs=())


def test_an_input_that_the_model_does_not_take_is_refused() -> None:
    model = random_model(dataclasses.replace(PAPER, inputs=("pairs",)))
    images, texts, _ = random_inputs(PAPER)
    with pytest.raises(ConfigError, match=r"has 2 images, but the model takes pairs alone"):
        model.encode(images)  # lower blocks have an expert for these rows
    with pytest.raises(ConfigError, match=r"has 2 texts, but the model takes pairs alone"):
        model.encode(texts=texts)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"num_layers": 4}, "num_layers 3 there, 4 here"),
        ({"hidden_size": 48}, "hidden_size 24 there, 48 here"),
        ({"sub_layernorm": False}, "sub_layernorm True there, False here"),
        (
            {"text_vocab_size": 60, "tie_word_embeddings": True},
            "text_vocab_size 50 there, 60 here; tie_word_embeddings",
        ),
    ],
)
def test_the_rest_is_refused(wanted: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = exported(random_model(SHARED), tmp_path / "w")
    with pytest.raises(ConfigError, match=f"x holds another model: {message}.*may differ") as caught:
        AdaptedWeights(PretrainedWeights(path), dataclasses.replace(SHARED, **wanted), "x")
    assert "max_text_length 20" not in str(caught.value)


def test_the_final_norm_is_left_out(tmp_path: Path) -> None:
    """Checks a VQAv2 model, which has no final norm although the pretrained weights have one."""
    stored, wanted = random_model(SHARED), dataclasses.replace(SHARED, final_norm=False)
    path = exported(stored, tmp_path / "w")
    weights = AdaptedWeights(PretrainedWeights(path), wanted, "x")
    assert weights.changes == ["final norm left out"]
    model = PretrainingModel(wanted)
    fill_parameters(model, weights)
    batch = random_batch(SHARED, 1, 1, 1)
    hidden = stored.run_layers(batch, layers=range(SHARED.num_pipeline_layers - 1))
    torch.testing.assert_close(model.run_layers(batch), hidden[batch.head_rows])
    back = exported(model, tmp_path / "back")
    again = AdaptedWeights(PretrainedWeights(back), SHARED, "x")
    with pytest.warns(UserWarning, match=r"no norm\.weight_shared"):
        fill_parameters(PretrainingModel(SHARED), again)


def test_decoupled_does_not_become_shared(tmp_path: Path) -> None:
    path = exported(random_model(decoupled()), tmp_path / "w")
    with pytest.raises(ConfigError, match="layout 'decoupled' there, 'shared' here"):
        PretrainingModel.from_pretrained(path, layout="shared")


def test_settings_that_change_no_tensor_may_differ(tmp_path: Path) -> None:
    path = exported(random_model(SHARED), tmp_path / "w")
    assert changes(SHARED, path, drop_path_rate=0.3, cross_entropy_chunk_size=7) == []
