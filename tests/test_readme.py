"""Tests that the Python examples in README and docs run unchanged."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.batches import small_model_config
from tests.inference.weights import ANSWERS, draw_photo, write_task_weights
from tests.test_preprocess import validation_pixels
from tests.weights.models import exported, random_model

ROOT = Path(__file__).parents[1]


def examples(page: str) -> list[str]:
    """Returns the Python examples of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def files(tokenizer_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes the files that the examples read into the working directory."""
    monkeypatch.chdir(tmp_path)
    exported(random_model(small_model_config(text_vocab_size=310)), Path("model.safetensors"))
    for task, settings in {"retrieval": {}, "captioning": {}, "nlvr2": {}, "vqa": {"answers": ANSWERS}}.items():
        write_task_weights(Path(f"{task}.safetensors"), task, settings)
    Path("text.spm").write_bytes(Path(tokenizer_files["text"]).read_bytes())
    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    Image.fromarray(photo).resize((600, 400)).save("photo.jpg", exif=exif)
    draw_photo(Path("other.jpg"))


@pytest.mark.usefixtures("files")
def test_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = examples("README.md")
    names: dict = {}
    exec(example, names)
    images, texts = capsys.readouterr().out.splitlines()
    assert images == "torch.Size([1, 17, 24])" and texts == f"torch.Size({list(names['features'].texts[0].shape)})"
    assert names["fusion"].model.config.inputs == ("pairs",)


@pytest.mark.usefixtures("files")
def test_features_and_answers() -> None:
    names: dict = {}
    for example in examples("docs/inference.md")[:-1]:
        exec(example, names)
    assert names["features"].shape == (2, 17, 24) and names["pair"].images.shape == (1, 17, 24)
    assert names["best"].shape == (2,) and len(names["answers"]) == 3 and isinstance(names["caption"], str)
    assert 0 <= float(names["probability"]) <= 1


@pytest.mark.usefixtures("files")
def test_the_plain_module(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {}
    exec(examples("docs/inference.md")[-1], names)
    images, texts = capsys.readouterr().out.splitlines()
    assert images == "torch.Size([1, 17, 24])" and texts == f"torch.Size([{len(names['texts'][0])}, 24])"
    assert names["features"].pair_texts[0].shape == names["features"].texts[0].shape
    assert -1 <= names["images"].min() < names["images"].max() <= 1
    with torch.no_grad():  # catches a recipe of its own in the example: EXIF ignored, the image squeezed
        pixels = validation_pixels(Path("photo.jpg"), image_size=16)
        assert torch.equal(names["model"].encode(images=pixels).images, names["features"].images)
