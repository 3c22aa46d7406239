"""The visual tokenizer's entry point, as the launcher starts it."""

import json
from pathlib import Path

import pytest

from beit3_ds.tokenizers import load_visual_tokenizer
from beit3_ds.train_visual_tokenizer import main
from tests.ranks import run_ranks
from tests.run_config import quickstart_mapping


def write_config(folder: Path, batch_size: int) -> Path:
    mapping = quickstart_mapping()
    mapping["beit3_ds"]["tokenizers"]["visual"] |= {
        "path": str(folder / "visual.safetensors"),
        "training_steps": 3,
        "continuous_steps": 1,
        "batch_size": batch_size,
        "warmup_steps": 1,
    }
    for stream in ("images", "pairs"):  # the smaller files: the end counts the codes of every image
        mapping["beit3_ds"]["data"][stream]["train"] = mapping["beit3_ds"]["data"][stream]["validation"]
    path = folder / "config.json"
    path.write_text(json.dumps(mapping))
    return path


@pytest.mark.slow
def test_two_ranks_write_one_tokenizer_and_its_picture(tmp_path: Path) -> None:
    config = write_config(tmp_path, batch_size=4)
    assert run_ranks(main, 2, [str(config), "--local_rank", "0"]) == [0, 0]  # catches an option that stops the launcher
    assert load_visual_tokenizer(tmp_path / "visual.safetensors").quantize.started
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("config.json", "visual.png", "visual.safetensors", "visual.safetensors.recipe.json"),
    ]


def test_what_the_user_can_mend_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent.json")]) == 2
    assert "no such config file" in capfd.readouterr().err
