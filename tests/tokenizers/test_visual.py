"""Tests the visual tokenizer: shapes, its file, and whether it fits a run."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from beit3_ds.config import ConfigError, RunConfig, VisualTokenizerConfig, build_run_config
from beit3_ds.tokenizers import (
    VisualTokenizer,
    check_visual_tokenizer_fits,
    load_visual_tokenizer,
    save_visual_tokenizer,
)

TEACHER_WIDTH = 11
QUICKSTART = Path(__file__).parents[2] / "ds_configs" / "quickstart_cpu.json"


def small_config(path: Path | str = "unused", **changes: int) -> VisualTokenizerConfig:
    sizes = {"image_size": 24, "patch_size": 8, "hidden_size": 16, "num_layers": 2, "decoder_layers": 1}
    sizes |= {"num_attention_heads": 2, "codebook_size": 10, "codebook_dim": 4}
    return VisualTokenizerConfig(path=str(path), **(sizes | changes))  # type: ignore[arg-type]


def small_tokenizer() -> VisualTokenizer:
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(small_config(), TEACHER_WIDTH, "a teacher of its own")
    with torch.no_grad():
        tokenizer.quantize.start(tokenizer.project(torch.rand(8, 3, 24, 24) * 2 - 1).flatten(0, 1))
    return tokenizer.eval()


@pytest.fixture
def run() -> RunConfig:
    return build_run_config(json.loads(QUICKSTART.read_text(encoding="utf-8")))


def test_encode_changes_nothing_in_training_mode() -> None:
    tokenizer = small_tokenizer().train()
    before = tokenizer.quantize.weight.clone()
    codes = tokenizer.encode(torch.rand(3, 3, 24, 24))
    assert torch.equal(tokenizer.quantize.weight, before)  # pretraining's targets must not move
    assert not codes.requires_grad


def test_each_code_is_at_the_place_of_its_patch() -> None:
    tokenizer = small_tokenizer()
    tokenizer.encoder.pos_embed.data.zero_()
    tokenizer.encoder.blocks = torch.nn.ModuleList()  # without attention a code depends on its patch alone
    image = -torch.ones(1, 3, 24, 24)
    marked = image.clone()
    marked[:, :, 8:16, 16:24] = torch.rand(3, 8, 8)
    changed = (tokenizer.project(image) - tokenizer.project(marked)).norm(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [1 * 3 + 2]  # row-major; a transposed grid gives 2 * 3 + 1


def test_codes_do_not_depend_on_autocast() -> None:
    tokenizer = small_tokenizer()
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.project(torch.rand(1, 3, 24, 24)).dtype == torch.float32  # near ties decide the code


def test_parameter_names_are_those_of_the_released_files() -> None:
    names = set(small_tokenizer().state_dict())
    block = {"norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"}
    expected = {f"encoder.blocks.1.{layer}.{kind}" for layer in block for kind in ("weight", "bias")}
    expected |= {"encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed.proj.weight", "encoder.norm.weight"}
    expected |= {"decoder.patch_embed.proj.weight", "encode_task_layer.0.weight", "encode_task_layer.2.bias"}
    assert expected <= names, expected - names


def test_a_saved_tokenizer_gives_the_same_codes(tmp_path: Path) -> None:
    tokenizer, pixels = small_tokenizer(), torch.rand(5, 3, 24, 24) * 2 - 1
    path = tmp_path / "new" / "visual.safetensors"
    save_visual_tokenizer(path, tokenizer)
    loaded = load_visual_tokenizer(path)
    assert torch.equal(loaded.encode(pixels), tokenizer.encode(pixels))
    assert loaded.config == tokenizer.config
    assert not loaded.training  # catches a codebook that keeps learning during pretraining
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.quantize.started  # catches a codebook that would be initialised again
    assert [file.name for file in path.parent.iterdir()] == ["visual.safetensors"]


def test_a_missing_file_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task visual_tokenizer trains it"):
        load_visual_tokenizer(tmp_path / "absent.safetensors")


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(b"no tensors here")
    with pytest.raises(ConfigError, match="is not a visual tokenizer"):
        load_visual_tokenizer(path)


def test_a_tokenizer_of_another_shape_is_refused(run: RunConfig) -> None:
    fitting = VisualTokenizer(run.tokenizers.visual, TEACHER_WIDTH)
    check_visual_tokenizer_fits(fitting, run)
    more_codes = dataclasses.replace(run.tokenizers.visual, codebook_size=600)
    with pytest.raises(ConfigError, match=r"has 600 codes, model\.visual_vocab_size is 256"):
        check_visual_tokenizer_fits(VisualTokenizer(more_codes, TEACHER_WIDTH), run)
    larger_view = dataclasses.replace(run.tokenizers.visual, image_size=128)
    with pytest.raises(ConfigError, match=r"trained on 128 px / patch 8 \(a grid of 16\)"):
        check_visual_tokenizer_fits(VisualTokenizer(larger_view, TEACHER_WIDTH), run)
