"""Tests the output of `beit3 inspect`."""

from pathlib import Path

import torch

from beit3_ds.tasks.pretraining.model import PretrainingModel
from beit3_ds.weights.export import export_weights
from beit3_ds.weights.inspection import describe_weights, part_of
from tests.batches import small_model_config
from tests.weights.models import ModelReader, random_model


def rows(text: str) -> dict[str, list[str]]:
    """Returns the cells of the table of parts, by row."""
    table = text[text.index("part ") :].splitlines()[1:]
    return {line.split("  ")[0]: line.split("  ", 1)[1].split() for line in table if line}


def test_parts_add_up_to_the_model(tmp_path: Path) -> None:
    model = random_model(small_model_config())
    export_weights(ModelReader(model, step=1234), tmp_path / "weights", dtype=torch.bfloat16, max_shard_bytes=30_000)
    text = describe_weights(tmp_path / "weights")
    assert "exported weights, after 1234 updates" in text and "num_vision_language_layers: 1" in text
    parts = rows(text)
    tensors, parameters, *size, dtype = parts.pop("the model")
    assert int(tensors) == sum(1 for _ in model.parameters()) == sum(int(cells[0]) for cells in parts.values())
    count = sum(p.numel() for p in model.parameters())
    assert int(parameters.replace(",", "")) == count == sum(int(c[1].replace(",", "")) for c in parts.values())
    assert size == [f"{count * 2 / 1000:.1f}", "kB"] and dtype == "bfloat16"
    fc1 = 24 * 40 + 40 + 24 * 40 + 24 + 2 * 24  # fc1, fc2 and the norm of one expert
    assert parts["experts, vision-language"][:2] == ["6", f"{fc1:,}"]
    assert parts["experts, vision"][:2] == ["18", f"{3 * fc1:,}"]


def test_every_parameter_has_its_part() -> None:
    for layout in ({}, {"layout": "decoupled", "num_vision_language_layers": 0, "sub_layernorm": True}):
        names = [name for name, _ in PretrainingModel(small_model_config(**layout)).named_parameters()]
        parts = {name: part_of(name) for name in names}
        for name, part in parts.items():  # "embeddings" is what is left
            assert (part == "embeddings") == name.startswith("embeddings."), name
        assert part_of("released.head.weight") == "kept for unilm's format"


def test_a_released_file_is_described_and_listed(tmp_path: Path) -> None:
    model = random_model(small_model_config(hidden_size=64, num_attention_heads=1))
    export_weights(ModelReader(model), tmp_path / "weights.pth", format="unilm-dual")
    released = torch.load(tmp_path / "weights.pth", weights_only=True)
    torch.save({"model": released["model"]}, tmp_path / "weights.pth")  # without what this program notes beside it
    text = describe_weights(tmp_path / "weights.pth", every_tensor=True)
    assert "released weights (unilm's format)\n" in text  # without a step
    assert "layout: decoupled" in text and "max_text_length: 1022" in text
    lines = text.splitlines()
    assert any(line.split() == ["embeddings.cls_token", "float32", "[64]"] for line in lines)
    key = "released.beit3.encoder.embed_positions.A.weight"
    assert any(line.split() == [key, "float32", "[2,", "64]"] for line in lines)
