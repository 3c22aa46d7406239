"""Tests `beit3 import` of a released visual tokenizer."""

from pathlib import Path

import pytest
import torch

from beit3_ds.cli.main import main
from beit3_ds.tokenizers import load_visual_tokenizer
from tests.tokenizers.test_released import SMALL, released_state


def test_import_tells_a_tokenizer_by_its_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": released_state(**SMALL)}, tmp_path / "vqkd.pth")
    out = tmp_path / "visual.safetensors"
    command = ["import", str(tmp_path / "vqkd.pth"), str(out)]
    assert main([*command, "--image-size", "32"]) == 0
    assert "32 codes, 32 px / patch 8" in capsys.readouterr().out
    assert load_visual_tokenizer(out).config.image_size == 32
    before = out.read_bytes()
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err and out.read_bytes() == before
    assert main([*command, "--force"]) == 0
    assert load_visual_tokenizer(out).config.image_size == 24
