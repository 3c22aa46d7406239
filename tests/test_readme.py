"""Runs the README's Python example unchanged."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.batches import small_model_config
from tests.test_preprocess import validation_pixels
from tests.weights.models import exported, random_model

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs(
    tokenizer_files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    exported(random_model(small_model_config(text_vocab_size=310)), Path("model.safetensors"))
    Path("text.spm").write_bytes(Path(tokenizer_files["text"]).read_bytes())
    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    Image.fromarray(photo).resize((600, 400)).save("photo.jpg", exif=exif)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(example, names)
    images, texts = capsys.readouterr().out.splitlines()
    assert images == "torch.Size([1, 17, 24])" and texts == f"torch.Size([{len(names['texts'][0])}, 24])"
    assert names["features"].pair_texts[0].shape == names["features"].texts[0].shape
    assert -1 <= names["images"].min() < names["images"].max() <= 1
    with torch.no_grad():  # catches a recipe of its own in the example: EXIF ignored, the image squeezed
        pixels = validation_pixels(Path("photo.jpg"), image_size=16)
        assert torch.equal(names["model"].encode(images=pixels).images, names["features"].images)
