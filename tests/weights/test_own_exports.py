"""Tests that files exported for other projects are read back unchanged."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from beit3_ds.cli.main import main
from beit3_ds.config import ConfigError
from beit3_ds.model import PretrainedWeights
from beit3_ds.tasks.pretraining.model import PretrainingModel
from beit3_ds.untrusted_file import read_tensors
from beit3_ds.weights.export import ExportFormat, export_weights
from beit3_ds.weights.inspection import describe_weights
from beit3_ds.weights.reader import open_for_import, open_weights
from tests.batches import decoupled, small_model_config
from tests.weights.models import ModelReader, random_inputs, random_model

LAYOUTS = {  # heads of 8 features, which no released model has
    "paper": small_model_config(),
    "sub-LN, tied": small_model_config(sub_layernorm=True, tie_word_embeddings=True),
    "no vision-language experts": small_model_config(num_vision_language_layers=0),
    "decoupled": decoupled(),
}
SUFFIXES: dict[ExportFormat, str] = {"unilm-dual": ".pth", "unilm-fusion": ".pth", "timm": ".safetensors"}


def cells() -> list[tuple[str, ExportFormat]]:
    return [
        (layout, format)
        for layout, config in LAYOUTS.items()
        for format in SUFFIXES
        if format != "unilm-fusion" or config.num_vision_language_layers
    ]


def stored(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("layout", "format"), cells())
def test_exports_come_back(layout: str, format: ExportFormat, dtype: torch.dtype, tmp_path: Path) -> None:
    """Compares features where the format is exact, and compares a second export bit for bit."""
    model = random_model(LAYOUTS[layout]).to(dtype)
    out, back, again = (tmp_path / f"{name}{SUFFIXES[format]}" for name in ("out", "back", "again"))
    back = back.with_suffix(".safetensors")
    export_weights(ModelReader(model, step=7), out, format=format)
    export_weights(open_for_import(out), back)
    imported, weights = PretrainingModel.from_pretrained(back, dtype=dtype), PretrainedWeights(back)
    assert weights.step == 7 and weights.model.num_attention_heads == model.config.num_attention_heads
    assert not [name for name in weights.names() if name.startswith("released.")]
    images, texts, pairs = random_inputs(model.config)
    with torch.no_grad():
        ours, theirs = model.encode(images, texts, pairs), imported.encode(images, texts, pairs)
    exact = {"timm": ("images",), "unilm-fusion": ("pair_images", "pair_texts")}.get(format, ("images", "texts"))
    if not model.config.num_vision_language_layers and format == "unilm-dual":
        exact = ours._fields
        assert weights.model == model.config
    for kind in exact:
        torch.testing.assert_close(getattr(theirs, kind), getattr(ours, kind), rtol=0, atol=0)
    export_weights(open_weights(back), again, format="timm" if format == "timm" else "unilm-dual")
    first, second = stored(out), stored(again)
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype and torch.equal(second[name], tensor), name


@pytest.mark.parametrize(("layout", "format"), cells())
def test_exports_are_described(layout: str, format: ExportFormat, tmp_path: Path) -> None:
    out = tmp_path / f"out{SUFFIXES[format]}"
    model = random_model(LAYOUTS[layout])
    export_weights(ModelReader(model, step=7), out, format=format)
    text = describe_weights(out, every_tensor=True)
    assert (text.startswith(f"{out}: ") and "for timm" in text) or f"exported as {format}" in text
    assert ", after 7 updates" in text and "num_attention_heads: 3" in text
    assert ("blocks.0.ffn.fc1.bias_language" in text) == (format != "timm")  # lists what the file holds
    assert "experts, vision" in text and f"layout: {model.config.layout}" in text


def test_commands_take_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_weights(ModelReader(random_model(LAYOUTS["paper"])), tmp_path / "v.safetensors", format="timm")
    assert main(["inspect", str(tmp_path / "v.safetensors")]) == 0
    out = tmp_path / "back.safetensors"
    assert main(["import", str(tmp_path / "v.safetensors"), str(out), "--image-size", "24"]) == 0
    output = capsys.readouterr().out
    assert "holds a vision tower: " in output and "have initial values" in output
    assert PretrainingModel.from_pretrained(out).encode(images=torch.zeros(1, 3, 24, 24)).images.shape == (1, 37, 24)


def test_the_reference_and_timm_pass_over_the_note(tmp_path: Path) -> None:
    """Checks that the loaders of the reference and of timm find plain tensors and ignore the note.

    The note is metadata that this project adds to the file.
    """
    model = random_model(LAYOUTS["paper"])
    export_weights(ModelReader(model), tmp_path / "x.pth", format="unilm-dual")
    saved = torch.load(tmp_path / "x.pth", weights_only=True)
    assert set(saved) == {"model", "beit3_ds_export"} and isinstance(saved["beit3_ds_export"], str)
    assert saved["model"].keys() == read_tensors(tmp_path / "x.pth").keys()


def test_a_changed_export_is_refused(tmp_path: Path) -> None:
    """Checks that an export is refused if the A and B copies of a shared tensor have been trained apart."""
    export_weights(ModelReader(random_model(LAYOUTS["paper"])), tmp_path / "x.pth", format="unilm-dual")
    saved = torch.load(tmp_path / "x.pth", weights_only=True)
    saved["model"]["beit3.encoder.layers.1.self_attn.q_proj.B.weight"] += 1
    torch.save(saved, tmp_path / "trained.pth")
    with pytest.raises(ConfigError, match=r"q_proj\.B\.weight must equal other tensors .*was changed after its export"):
        open_for_import(tmp_path / "trained.pth")
    torch.save(saved | {"beit3_ds_export": "{}"}, tmp_path / "note.pth")
    with pytest.raises(ConfigError, match=r"the note about its export cannot be read"):
        open_for_import(tmp_path / "note.pth")


PARTS: dict[str, tuple[tuple[str, ...], ExportFormat, set[str]]] = {
    "vision encoder": (("images",), "unilm-dual", {"A"}),
    "language encoder": (("texts",), "unilm-dual", {"B"}),
    "dual encoder": (("images", "texts"), "unilm-dual", {"A", "B"}),
    "fusion encoder": (("pairs",), "unilm-fusion", {"A", "B"}),
    "images and pairs": (("images", "pairs"), "unilm-dual", {"A"}),  # its top block has no language expert
}


@torch.no_grad()
@pytest.mark.parametrize("part", PARTS)
def test_models_of_some_inputs_come_back(part: str, tmp_path: Path) -> None:
    """Exports only the existing experts, and reads the file as a model for the inputs that these experts serve."""
    inputs, format, letters = PARTS[part]
    model, out, back = random_model(small_model_config(inputs=inputs)), tmp_path / "out.pth", tmp_path / "back"
    export_weights(ModelReader(model), out, format=format)
    assert {key.split(".ffn.")[1][0] for key in stored(out) if ".ffn." in key} == letters
    export_weights(open_for_import(out), back)
    imported = PretrainingModel.from_pretrained(back)
    assert imported.config.inputs == (("images",) if letters == {"A"} else inputs)
    images, texts, pairs = random_inputs(model.config)
    given = {"images": images, "texts": texts, "pairs": pairs}
    for kind in imported.config.inputs:
        one = {kind: given[kind]}
        for ours, theirs in zip(model.encode(**one), imported.encode(**one), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)  # two products where fusion has one


def test_exports_without_the_needed_experts_are_refused(tmp_path: Path) -> None:
    fusion, language = (ModelReader(random_model(small_model_config(inputs=(kind,)))) for kind in ("pairs", "texts"))
    with pytest.raises(ConfigError, match=r"takes pairs alone.*unilm-fusion"):
        export_weights(fusion, tmp_path / "a.pth", format="unilm-dual")
    with pytest.raises(ConfigError, match="has no vision-language expert"):
        export_weights(language, tmp_path / "a.pth", format="unilm-fusion")
    with pytest.raises(ConfigError, match=r"model for texts alone has no vision expert"):
        export_weights(language, tmp_path / "a.safetensors", format="timm")
