"""Tests that pretrained weights, also for other image sizes, load into a dense model."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor

from beit3_ds.config import ConfigError, DenseConfig, ModelConfig
from beit3_ds.data.packing import pack_grids
from beit3_ds.model import BEiT3, PretrainedWeights
from beit3_ds.model.adaptation import AdaptedWeights
from beit3_ds.model.dense.canvas import to_canvas
from beit3_ds.model.dense.resampling import resample_patch_weight
from beit3_ds.weights.export import export_weights
from tests.batches import decoupled, small_model_config
from tests.model.dense.dense_models import build_dense, dense_config, random_images
from tests.model.dense.plain_windows import plain_maps
from tests.weights.models import exported, random_model

GRIDS = ((4, 4), (3, 5))


@pytest.mark.parametrize(("old", "new"), [(14, 16), (16, 14), (4, 4)])
def test_patch_weight_equals_timm(old: int, new: int) -> None:
    weight = torch.randn(5, 3, old, old, generator=torch.Generator().manual_seed(0))
    expected = resample_patch_embed(weight, [new, new])
    torch.testing.assert_close(resample_patch_weight(weight, new), expected, rtol=1e-4, atol=1e-5)


def test_patch_weight_keeps_embeddings_of_smooth_patches() -> None:
    """Catches a bicubically resampled patch kernel, which changes the scale of embeddings."""
    weight = torch.randn(7, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    image = torch.randn(1, 3, 14, 14, generator=torch.Generator().manual_seed(1))
    larger = F.interpolate(image, (16, 16), mode="bicubic", align_corners=False, antialias=True)
    old, new = F.conv2d(image, weight), F.conv2d(larger, resample_patch_weight(weight, 16))
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("stored", [small_model_config(), decoupled()], ids=["paper", "released"])
def test_pretrained_weights_compute_the_same_without_cls(stored: ModelConfig, tmp_path: Path) -> None:
    model = random_model(stored)
    path = exported(model, tmp_path / "w")
    dense = DenseConfig(window_size=3, global_blocks=(1,), relative_positions=True)
    loaded = BEiT3.from_pretrained(path, inputs=("images",), dense=dense)
    assert not {"embeddings.cls_token", "embeddings.mask_token"} & {name for name, _ in loaded.named_parameters()}
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    parameters["embeddings.image_position"] = parameters["embeddings.image_position"][1:]
    plain = dataclasses.replace(stored, dense=dataclasses.replace(dense, relative_positions=False), inputs=("images",))
    images = random_images(GRIDS)
    with torch.no_grad():
        maps = to_canvas(loaded(pack_grids(images, stored.patch_size)), GRIDS, 3)
        for image, ours in zip(images, maps, strict=True):
            expected = plain_maps(parameters, plain, image)
            torch.testing.assert_close(
                ours[:, : expected.shape[0], : expected.shape[1]].permute(1, 2, 0), expected, rtol=1e-4, atol=1e-5
            )
    notes = AdaptedWeights(PretrainedWeights(path), loaded.config, "x").changes
    assert notes[:2] == ["CLS and mask token left out", "relative positions start at zero"]


def test_other_windows_images_and_patches(tmp_path: Path) -> None:
    stored = dense_config()
    model = build_dense(stored)
    path = exported(model, tmp_path / "w")
    wanted: dict[str, Any] = {
        "image_size": 36,
        "patch_size": 6,
        "dense": DenseConfig(window_size=5, global_blocks=(0,), relative_positions=True),
    }
    loaded = BEiT3.from_pretrained(path, **wanted)
    ours, old = dict(loaded.named_parameters()), dict(model.named_parameters())
    for layer, extent in enumerate((6, 5, 5)):
        table = old[f"blocks.{layer}.attention.relative_position.rows"]
        expected = F.interpolate(table.T[None], 2 * extent - 1, mode="linear")[0].T
        torch.testing.assert_close(ours[f"blocks.{layer}.attention.relative_position.rows"], expected)
    positions = old["embeddings.image_position"].unflatten(0, (4, 4)).permute(2, 0, 1)[None]
    expected = F.interpolate(positions, (6, 6), mode="bicubic", align_corners=False)[0].flatten(1).T
    torch.testing.assert_close(ours["embeddings.image_position"], expected)
    assert ours["embeddings.patch.weight"].shape == (24, 3, 6, 6)
    notes = AdaptedWeights(PretrainedWeights(path), loaded.config, "x").changes
    assert notes == [
        "kernel of patches of 4 px resampled to 6 px",
        "positions of 16 px interpolated to 36 px",
    ]


def test_unchanged_weights_load_to_the_bit(tmp_path: Path) -> None:
    model = build_dense(dense_config())
    loaded = BEiT3.from_pretrained(exported(model, tmp_path / "w"))
    assert loaded.config == model.config
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_refuses_what_needs_cls(tmp_path: Path) -> None:
    path = exported(build_dense(dense_config()), tmp_path / "w")
    with pytest.raises(ConfigError, match="dense"):
        AdaptedWeights(PretrainedWeights(path), dataclasses.replace(dense_config(), dense=None), "weights")
    for format in ("unilm-dual", "timm"):
        with pytest.raises(ConfigError, match="no CLS token"):
            export_weights(PretrainedWeights(path), tmp_path / "out.safetensors", format=format)


@pytest.mark.parametrize(
    ("dense", "inputs", "message"),
    [
        ({"window_size": 3, "global_blocks": (3,)}, ("images",), "num_layers - 1 = 2"),
        ({"window_size": 3, "global_blocks": (1, 1)}, ("images",), "at most once"),
        ({"global_blocks": (1,)}, ("images",), "no effect"),
        ({"window_size": 3}, ("images", "texts"), r'inputs.*\["images"\]'),
    ],
)
def test_refuses_settings_that_contradict_each_other(
    dense: dict[str, Any], inputs: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small_model_config(dense=DenseConfig(**dense), inputs=inputs)
