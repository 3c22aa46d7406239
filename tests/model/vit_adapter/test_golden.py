"""Compares the ViT-Adapter with recorded values of the original program (`tests/fixtures/golden/README.md`)."""

# B images, N patches, D hidden.

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from beit3_ds.model.vit_adapter import AdapterConfig, ViTAdapter

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "vit_adapter.safetensors"
SIZE, PATCHES = (64, 96), (4, 6)


def _own_name_address(name: str) -> str:
    """Returns this project's name of a parameter of the original program."""
    if stem := re.fullmatch(r"spm\.stem\.(\d)\.(\w+)", name):  # convolution, norm, ReLU, three times
        number, is_norm = divmod(int(stem[1]), 3)
        return f"prior.stem{number + 1}.{'norm' if is_norm else 'conv'}.{stem[2]}"
    name = re.sub(r"^spm\.(conv\d)\.(\d)", lambda found: f"prior.{found[1]}.{('conv', 'norm')[int(found[2])]}", name)
    name = re.sub(r"^spm\.", "prior.", name).replace("dwconv.dwconv", "dwconv")
    name = re.sub(r"^level_embed", "prior.level_embed", name)
    return re.sub(r"^(up|norm\d)\.", r"output.\1.", name)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def adapter(golden: dict[str, Tensor]) -> ViTAdapter:
    config = AdapterConfig(conv_channels=8, num_interactions=2, num_heads=4, adds_trunk_features=False)
    built = ViTAdapter(config, hidden_size=32, num_layers=4, build_norm=nn.BatchNorm2d)  # the original's norm
    weights = {name.removeprefix("weights."): value for name, value in golden.items() if name.startswith("weights.")}
    built.load_state_dict(
        {_own_name_address(name): value for name, value in weights.items() if not name.startswith("trunk.")}
    )
    return built.eval()


def _close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_spatial_prior_equals_the_original(adapter: ViTAdapter, golden: dict[str, Tensor]) -> None:
    c1, rows, sizes = adapter.prior(golden["in.image"])
    assert sizes == [(8, 12), (4, 6), (2, 3)]
    lengths = [rows * columns for rows, columns in sizes]
    levels = zip(rows.split(lengths, 1), adapter.prior.level_embed, strict=True)
    _close(c1, golden["out.spm.c1"])
    for number, (part, level) in enumerate(levels, start=2):
        _close(part - level, golden[f"out.spm.c{number}"])


def test_interactions_and_outputs_equal_the_original(adapter: ViTAdapter, golden: dict[str, Tensor]) -> None:
    after: list[Tensor] = []

    def run_blocks(x_BND: Tensor, blocks: range) -> Tensor:
        for block in blocks:
            x_BND = x_BND + x_BND @ golden[f"weights.trunk.{block}"]
        after.append(x_BND)
        return x_BND

    pyramids: list[Tensor] = []
    for interaction in adapter.interactions:
        last = (interaction.extra_extractors or [interaction.extractor])[-1]
        last.register_forward_hook(lambda module, inputs, output: pyramids.append(output))
    maps = adapter(golden["in.image"], golden["in.x"], PATCHES, run_blocks)
    for number, (x_BND, c_BLD) in enumerate(zip(after, pyramids, strict=True)):
        _close(x_BND, golden[f"out.interaction{number}.x"])
        _close(c_BLD, golden[f"out.interaction{number}.c"])
    for number, found in enumerate(maps, start=1):
        _close(found, golden[f"out.norm{number}"])
