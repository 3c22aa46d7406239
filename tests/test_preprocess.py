"""Tests that a user's image is preprocessed exactly as the loader does for the validation loss."""

import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from beit3_ds.config import build_run_config
from beit3_ds.data.samples import VALIDATION_EPOCH, SampleKey
from beit3_ds.pixels import to_floats
from beit3_ds.preprocess import preprocess
from beit3_ds.tasks.pretraining.samples import build_evaluation_streams
from tests.run_config import small_run_mapping


def validation_pixels(image: Path, image_size: int, tokenizer_image_size: int = 24) -> Tensor:
    """Returns the validation pixels of an image, (1, 3, s, s), as a run reads them."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(image, folder)
        mapping = small_run_mapping(0, image_size=image_size, patch_size=image_size // 4)
        own = mapping["beit3_ds"]
        own["tokenizers"]["visual"] |= {"image_size": tokenizer_image_size, "patch_size": tokenizer_image_size // 4}
        source = [{"path": folder, "format": "folder"}]
        own["data"]["images"] |= {"train": source, "validation": source}
        for stream in ("pairs", "texts"):
            own["data"][stream] |= {"validation": []}
        config = build_run_config(mapping)
        streams = build_evaluation_streams(config, tokenizer=_NO_TEXT)  # type: ignore[arg-type]
        sample = streams["images"].prepare(SampleKey(1, "images", VALIDATION_EPOCH, 0))
        return to_floats(sample.views.model[None])


class _NoText:
    def word_borders(self) -> None:
        return None


_NO_TEXT = _NoText()


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng([width, height, channels])
    small = Image.fromarray(rng.integers(0, 256, (9, 13, channels), dtype=np.uint8).squeeze())
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))


def write(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def turned(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


FILES: dict[str, Callable[[Path], Path]] = {
    "large jpeg, EXIF": lambda f: write(f / "a.jpg", Image.fromarray(noise(490, 350)), exif=turned(6)),
    "mirrored": lambda f: write(f / "a.jpg", Image.fromarray(noise(70, 90)), exif=turned(5)),
    "alpha": lambda f: write(f / "a.png", Image.fromarray(noise(50, 61, 4))),
    "grey with alpha": lambda f: write(f / "a.png", Image.fromarray(noise(50, 61, 2), "LA")),
    "palette": lambda f: write(f / "a.png", Image.fromarray(noise(64, 33)).quantize(9), transparency=3),
    "16 bit": lambda f: write(f / "a.png", Image.fromarray(noise(40, 40, 1).astype(np.uint16) * 257)),
    "CMYK": lambda f: write(f / "a.jpg", Image.fromarray(noise(40, 44)).convert("CMYK")),
    "tiny": lambda f: write(f / "a.gif", Image.fromarray(noise(3, 2))),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_form_of_an_image_gives_the_loaders_pixels(kind: str, tmp_path: Path) -> None:
    path = FILES[kind](tmp_path)
    expected = validation_pixels(path, 16)[0]
    with Image.open(path) as opened:
        forms = [path, str(path), path.read_bytes(), opened]
        for form in forms:
            assert torch.equal(preprocess(form, 16), expected), f"{kind} as {type(form).__name__}"
    assert expected.shape == (3, 16, 16) and -1 <= expected.min() < expected.max() <= 1


@settings(max_examples=15, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.sampled_from([8, 16, 28]), jpeg=st.booleans())
def test_pixels_do_not_depend_on_the_tokenizer(width: int, height: int, size: int, jpeg: bool) -> None:
    """Catches a JPEG that is decoded at reduced size because of the tokenizer's view."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / ("a.jpg" if jpeg else "a.png"), Image.fromarray(noise(width, height)))
        for tokenizer_image_size in (8, 40):
            found = validation_pixels(path, size, tokenizer_image_size)
            assert torch.equal(found[0], preprocess(path, size))


def test_what_is_no_image_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"a\.jpg: .*cannot identify the image"):
        preprocess(tmp_path / "a.jpg", 16)
    with pytest.raises(OSError, match=r"absent\.jpg"):
        preprocess(tmp_path / "absent.jpg", 16)
    with pytest.raises(TypeError, match=r"image is a ndarray\. Pass the path"):
        preprocess(np.zeros((4, 4, 3), np.uint8), 16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="image_size=0"):
        preprocess(Image.new("RGB", (4, 4)), 0)
    with pytest.raises(ValueError, match="no pixels: 0 x 4"):  # torch's own error names no image
        preprocess(Image.new("RGB", (0, 4)), 16)
    buffer = io.BytesIO()
    Image.new("F", (4, 4)).save(buffer, "tiff")
    with pytest.raises(ValueError, match="does not say which value is white"):
        preprocess(buffer.getvalue(), 16)


def test_pipes_and_endless_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "hole.png").open("wb") as file:
        file.truncate(1 << 40)
    for name in ("pipe.png", "hole.png"):
        with pytest.raises(OSError, match=name):
            preprocess(tmp_path / name, 32)
    with pytest.raises(OSError, match="not a regular file"):
        preprocess("/dev/zero", 32)
