"""Tests the image that shows the codes of the visual tokenizer."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from beit3_ds.config import build_run_config
from beit3_ds.tasks.visual_tokenizer.code_picture import code_colors, code_picture_path, draw_codes, write_code_picture
from beit3_ds.tokenizers import VisualTokenizer
from tests.run_config import visual_tokenizer_mapping


def started_tokenizer(folder: Path) -> VisualTokenizer:
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(build_run_config(visual_tokenizer_mapping(folder)).tokenizers.visual, teacher_width=4)
    with torch.no_grad():
        tokenizer.quantize.start(tokenizer.project(torch.rand(8, 3, 64, 64) * 2 - 1).flatten(0, 1))
    return tokenizer.eval()


def test_panels_show_input_mask_and_codes(tmp_path: Path) -> None:
    tokenizer = started_tokenizer(tmp_path)
    views = torch.rand(2, 3, 64, 64) * 2 - 1
    masks = torch.zeros(2, 64, dtype=torch.bool)
    masks[1, 1 * 8 + 2] = True  # row 1, column 2
    picture = draw_codes(tokenizer, views, masks)
    rows = picture.reshape(2, 200, 3, 200, 3).transpose(0, 2, 1, 3, 4)[:, :, 4:-4, 4:-4]  # image, panel, y, x, colour
    shown = torch.from_numpy(rows[:, 0, 1::3, 1::3].copy()).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(shown, views, atol=0.005, rtol=0)
    assert np.array_equal(rows[0, 1], rows[0, 0])
    changed = (rows[1, 1] != rows[1, 0]).any(-1).nonzero()
    assert (changed[0].min() // 24, changed[0].max() // 24) == (1, 1)  # catches a transposed mask
    assert (changed[1].min() // 24, changed[1].max() // 24) == (2, 2)
    expected = (code_colors(tokenizer.quantize.weight)[tokenizer.encode(views)] * 255).round().to(torch.uint8)
    patches = torch.from_numpy(rows[:, 2, 12::24, 12::24].copy()).flatten(1, 2)  # the middle of every patch
    assert torch.equal(patches, expected)


def test_near_codes_have_near_colours() -> None:
    angles = torch.linspace(0, 3, 64)
    colors = code_colors(torch.stack([angles.cos(), angles.sin()], dim=1))
    assert colors.shape == (64, 3) and colors.min() >= 0 and colors.max() <= 1
    neighbours = (colors[1:] - colors[:-1]).norm(dim=1)
    assert neighbours.mean() < 0.1 < (colors[0] - colors[63]).norm()
    assert len(colors.unique(dim=0)) == 64  # every code has its own colour


def test_a_file_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "codes.png"
    write_code_picture(build_run_config(visual_tokenizer_mapping(tmp_path)), started_tokenizer(tmp_path), path)
    assert Image.open(path).size == (600, 1600)


def test_tokenizers_do_not_share_a_picture() -> None:
    names = ["v.one", "v.two", "v.safetensors", "v.1.safetensors", "v.2.safetensors"]
    pictures = [code_picture_path(Path("folder") / name) for name in names]
    assert len(set(pictures)) == len(names)  # catches an extension that is any text behind a dot
    assert pictures[2] == Path("folder/v.png")
