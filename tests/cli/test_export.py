"""Tests `beit3 export`, and runs `import` and `inspect` on the exported files."""

from pathlib import Path

import pytest
import torch

from beit3_ds.cli.main import main
from beit3_ds.model import PretrainedWeights
from beit3_ds.tasks.pretraining.model import PretrainingModel
from tests.batches import decoupled
from tests.file_state import file_state
from tests.weights.models import exported, random_model


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Writes exported weights whose attention heads are as wide as those of the released models."""
    config = decoupled(hidden_size=64, num_attention_heads=1)
    return exported(random_model(config), tmp_path / "weights.safetensors")


def test_weights_go_out_and_come_back(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference, back, shards = tmp_path / "unilm.pth", tmp_path / "back.safetensors", tmp_path / "shards"
    assert main(["export", str(weights), str(reference), "--format", "unilm-dual"]) == 0
    assert "EncoderConfig(img_size=16" in capsys.readouterr().out
    assert main(["import", str(reference), str(back), "--image-size", "24"]) == 0
    assert "3 layers of 64, 24 px" in capsys.readouterr().out
    assert PretrainedWeights(back).model.image_size == 24
    assert main(["export", str(weights), str(shards), "--dtype", "bf16", "--max-shard-size", "100kB"]) == 0
    output = capsys.readouterr().out
    assert f"BEiT3.from_pretrained('{shards}')" in output and f"{len(list(shards.iterdir())) - 1} files" in output
    ours, theirs = PretrainingModel.from_pretrained(shards), PretrainingModel.from_pretrained(weights)
    assert torch.equal(ours.heads.mim.weight, theirs.heads.mim.weight.bfloat16().float())
    assert main(["inspect", str(shards), "--tensors"]) == 0
    output = capsys.readouterr().out
    assert "exported weights" in output and "blocks.2.ffn.fc2.bias_vision" in output


def test_what_is_there_is_replaced_by_force_only(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    for command in (["export", str(weights), str(out)], ["export", str(weights), str(out), "--format", "timm"]):
        out.write_text("old")
        for option in ([], ["--force"]):
            assert main([*command, *option]) == 2
            assert "exists already" in capsys.readouterr().err and out.read_text() == "old"
        out.unlink()
        assert main(command) == 0
        before = file_state(out)
        assert main(command) == 2 and file_state(out) == before
        assert "exists already. Name another place, or replace it with --force" in capsys.readouterr().err
        assert main([*command, "--force"]) == 0 and file_state(out) != before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["export", "absent", "OUT"], "there is no absent"),
        (["export", "WEIGHTS", "OUT", "--max-shard-size", "much"], "'much' is not a size"),
        (["export", "WEIGHTS", "OUT", "--format", "unilm-fusion"], "no vision-language expert"),
        (["import", "absent.pth", "OUT"], "cannot be read"),
        (["import", "WEIGHTS", "OUT"], "not BEiT-3 in its released format"),
        (["inspect", "absent"], "there is no absent"),
    ],
)
def test_what_the_user_can_fix_is_one_line(
    command: list[str], message: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"WEIGHTS": str(weights), "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in command]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
