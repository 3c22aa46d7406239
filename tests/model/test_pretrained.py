"""Tests loading exported weights as a plain PyTorch model."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from beit3_ds.checkpoint.slices import TensorSlice, matrix_shape
from beit3_ds.config import ConfigError
from beit3_ds.model import PretrainedWeights
from beit3_ds.model.pretrained import INDEX_NAME
from beit3_ds.tasks.pretraining.model import PretrainingModel
from beit3_ds.weights.export import export_weights
from tests.batches import decoupled, small_model_config
from tests.weights.models import ModelReader, assert_features_equal, exported, random_inputs, random_model

LAYOUTS = {
    "paper": small_model_config(),
    "tied": small_model_config(tie_word_embeddings=True, sub_layernorm=True),
    "decoupled": decoupled(),
}


@pytest.mark.parametrize("max_shard_bytes", [None, 20_000], ids=["file", "shards"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_loaded_model_is_the_exported_one(layout: str, max_shard_bytes: int | None, tmp_path: Path) -> None:
    model = random_model(LAYOUTS[layout])
    export_weights(ModelReader(model, step=12), tmp_path / "weights", max_shard_bytes=max_shard_bytes)
    loaded = PretrainingModel.from_pretrained(tmp_path / "weights")
    assert loaded.config == model.config and not loaded.training
    assert PretrainedWeights(tmp_path / "weights").step == 12
    inputs = random_inputs(model.config)
    assert_features_equal(loaded.encode(*inputs), model.encode(*inputs), 1e-6)
    assert dict(loaded.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.state_dict().items():  # heads and the tied matrix included
        assert torch.equal(loaded.state_dict()[name], parameter), name
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())
    is_tied = loaded.heads.mlm.weight is loaded.embeddings.word.weight
    assert is_tied == model.config.tie_word_embeddings  # catches tied matrices that would diverge in training


@torch.no_grad()
def test_the_type_of_parameters_is_what_was_asked_for(tmp_path: Path) -> None:
    model = random_model(LAYOUTS["tied"])
    loaded = PretrainingModel.from_pretrained(exported(model, tmp_path / "weights.safetensors"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    images, _, _ = random_inputs(model.config)
    ours, expected = loaded.encode(images).images, model.encode(images).images
    assert ours.dtype == torch.bfloat16 and (ours - expected).abs().mean() < 0.05


@torch.no_grad()
def test_positions_are_interpolated_for_another_image_size(tmp_path: Path) -> None:
    model = random_model(small_model_config())  # 4 x 4 patches of 4 pixels
    loaded = PretrainingModel.from_pretrained(exported(model, tmp_path / "weights.safetensors"), image_size=24)
    table = model.embeddings.image_position
    grid = F.interpolate(table[1:].T.reshape(1, -1, 4, 4), size=(6, 6), mode="bicubic", align_corners=False)
    expected = torch.cat([table[:1], grid[0].flatten(1).T])
    torch.testing.assert_close(loaded.embeddings.image_position, expected)
    assert loaded.config.image_size == 24
    assert loaded.encode(torch.zeros(1, 3, 24, 24)).images.shape == (1, 37, 24)
    with pytest.raises(ConfigError, match="does not divide image_size=22"):
        PretrainingModel.from_pretrained(tmp_path / "weights.safetensors", image_size=22)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_parts_are_cut_out_of_the_matrix(data: st.DataObject, weights: PretrainedWeights) -> None:
    name = data.draw(st.sampled_from(weights.names()))
    rows, columns = matrix_shape(weights.shape(name))
    top, bottom = sorted(data.draw(st.tuples(*[st.integers(0, rows)] * 2)))
    left, right = sorted(data.draw(st.tuples(*[st.integers(0, columns)] * 2)))
    part = weights.read(name, TensorSlice(top, bottom, left, right))
    flat = weights.read(name).flatten()
    expected = [[float(flat[row * columns + column]) for column in range(left, right)] for row in range(top, bottom)]
    assert part.shape == (bottom - top, right - left)
    assert part.tolist() == expected


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> PretrainedWeights:
    return PretrainedWeights(exported(random_model(small_model_config()), tmp_path_factory.mktemp("w") / "weights"))


def rewritten(path: Path, **changes: object) -> Path:
    """Rewrites a file with changed tensors or a changed header; returns its path."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["beit3_ds"])
    tensors = load_file(path) | changes.pop("add", {})
    for name in changes.pop("drop", ()):
        del tensors[name]
    save_file(tensors, path, metadata={"beit3_ds": json.dumps(header | changes)})
    return path


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    config = small_model_config()
    model = random_model(config)

    def fresh() -> Path:
        path.unlink(missing_ok=True)
        return exported(model, path)

    with pytest.raises(ConfigError, match="there is no"):
        PretrainingModel.from_pretrained(path)
    path.write_bytes(b"PK\x03\x04 no safetensors")
    with pytest.raises(ConfigError, match=r"not a readable safetensors file.*beit3 import"):
        PretrainingModel.from_pretrained(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ConfigError, match=r"another program wrote it.*beit3 import"):
        PretrainingModel.from_pretrained(path)
    path.write_bytes(fresh().read_bytes()[:-10])
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        PretrainingModel.from_pretrained(path)
    with pytest.raises(ConfigError, match=r"1 are missing \(blocks.1.ffn.fc1.bias_language\)"):
        PretrainingModel.from_pretrained(rewritten(fresh(), drop=["blocks.1.ffn.fc1.bias_language"]))
    with pytest.raises(ConfigError, match=r"1 are unknown \(blocks.9.x\)"):
        PretrainingModel.from_pretrained(rewritten(fresh(), add={"blocks.9.x": torch.ones(1)}))
    with pytest.raises(ConfigError, match=r"cls_token has the shape \(23,\).*\(24,\)"):
        PretrainingModel.from_pretrained(rewritten(fresh(), add={"embeddings.cls_token": torch.ones(23)}))
    # Positions are interpolated only on request.
    with pytest.raises(ConfigError, match=r"image_position has the shape \(10, 24\)"):
        PretrainingModel.from_pretrained(rewritten(fresh(), add={"embeddings.image_position": torch.ones(10, 24)}))
    with pytest.raises(ConfigError, match="format version 2"):
        PretrainingModel.from_pretrained(rewritten(fresh(), format_version=2))
    with pytest.raises(ConfigError, match="unknown key 'num_layer'"):
        PretrainingModel.from_pretrained(rewritten(fresh(), model={"num_layer": 3}))
    with pytest.raises(ConfigError, match="header cannot be read"):
        PretrainingModel.from_pretrained(rewritten(fresh(), step="many"))


def test_folders_that_cannot_be_loaded_say_why(tmp_path: Path) -> None:
    run, shards = tmp_path / "step-00000004", tmp_path / "shards"
    run.mkdir()
    with pytest.raises(ConfigError, match=r"holds no weights: neither model\.safetensors\.index\.json nor checkpoints"):
        PretrainingModel.from_pretrained(run)
    (tmp_path / "output" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"output is the folder of a training run.*beit3 export"):
        PretrainingModel.from_pretrained(tmp_path / "output")
    (run / "index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"checkpoint of a training run.*beit3 export"):
        PretrainingModel.from_pretrained(run)
    model = random_model(small_model_config())
    export_weights(ModelReader(model), shards, max_shard_bytes=50_000)
    other = tmp_path / "other"
    export_weights(ModelReader(model, step=5), other, max_shard_bytes=50_000)
    first, second, *_ = sorted(file.name for file in shards.glob("*.safetensors"))
    (shards / first).write_bytes((other / first).read_bytes())
    with pytest.raises(ConfigError, match="different exports"):
        PretrainingModel.from_pretrained(shards)
    (other / second).unlink()
    with pytest.raises(ConfigError, match=second):
        PretrainingModel.from_pretrained(other)
    (shards / INDEX_NAME).write_text("[]")
    with pytest.raises(ConfigError, match=r"index.json cannot be read"):
        PretrainingModel.from_pretrained(shards)
