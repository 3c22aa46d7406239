"""Tests deformable attention, and edge cases of the ViT-Adapter."""

# B images, N patches, D hidden, L rows of the pyramid.

import pytest
import torch
from torch import Tensor

from beit3_ds.config import ConfigError
from beit3_ds.model.vit_adapter import AdapterConfig, ViTAdapter, adapter_initial_value
from beit3_ds.model.vit_adapter.deformable_attention import grid_places, sample_maps

SMALL = AdapterConfig(conv_channels=4, num_heads=2, num_interactions=2)


def _build(config: AdapterConfig = SMALL) -> ViTAdapter:
    adapter = ViTAdapter(config, hidden_size=16, num_layers=3)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter.named_parameters():
        value = adapter_initial_value(name, parameter.shape, config, generator)
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4 if value is None else value)
    return adapter


def _read_one(values: Tensor, size: tuple[int, int], x: float, y: float) -> Tensor:
    """Interpolates (rows * columns, K) values bilinearly at one point, with zeros outside; returns (K,) values."""
    rows, columns = size
    column, row, total = x * columns - 0.5, y * rows - 0.5, torch.zeros_like(values[0])
    for i in range(rows):
        for j in range(columns):
            total += max(0.0, 1 - abs(row - i)) * max(0.0, 1 - abs(column - j)) * values[i * columns + j]
    return total


def test_sample_maps_equals_a_loop() -> None:
    generator, sizes, heads = torch.Generator().manual_seed(1), [(3, 5), (2, 2)], 2
    values = torch.randn(2, 19, heads, 3, generator=generator)
    points = torch.rand(2, 4, heads, 2, 3, 2, generator=generator) * 1.4 - 0.2  # some outside
    weights = torch.rand(2, 4, heads, 2, 3, generator=generator)
    wanted = torch.zeros(2, 4, heads, 3)
    for image in range(2):
        for query in range(4):
            for head in range(heads):
                for level, (start, size) in enumerate(zip((0, 15), sizes, strict=True)):
                    own = values[image, start : start + size[0] * size[1], head]
                    for point in range(3):
                        x, y = points[image, query, head, level, point].tolist()
                        weight = weights[image, query, head, level, point]
                        wanted[image, query, head] += weight * _read_one(own, size, x, y)
    torch.testing.assert_close(sample_maps(values, sizes, points, weights), wanted.flatten(2))


def test_places_are_cell_centres() -> None:
    places = grid_places([(1, 2), (2, 1)], torch.device("cpu"))
    assert places.tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]


@pytest.mark.parametrize(("height", "width"), [(48, 80), (16, 16), (32, 112)])
def test_maps_have_the_sizes_of_any_image(height: int, width: int) -> None:
    adapter = _build()
    grid = (height // 16, width // 16)
    maps = adapter(torch.rand(2, 3, height, width), torch.rand(2, grid[0] * grid[1], 16), grid, lambda x, blocks: x)
    assert [of.shape[2:] for of in maps] == [(-(-height // cell), -(-width // cell)) for cell in (4, 8, 16, 32)]


def test_no_images_give_every_parameter_a_gradient_of_zeros() -> None:
    """Checks a micro-batch without images, in which ZeRO-3 still needs a gradient for every parameter."""
    adapter = _build()
    maps = adapter(torch.rand(0, 3, 32, 32), torch.rand(0, 4, 16), (2, 2), lambda x, blocks: x)
    sum(of.sum() for of in maps).backward()
    assert all(p.grad is not None and not p.grad.any() for p in adapter.parameters())


def test_initial_factor_of_zero_leaves_the_trunk_unchanged() -> None:
    seen: list[Tensor] = []
    x_BND = torch.rand(1, 4, 16)
    _build()(torch.rand(1, 3, 32, 32), x_BND, (2, 2), lambda x, blocks: seen.append(x) or x)
    assert len(seen) == 2 and all(torch.equal(x, x_BND) for x in seen)


def test_a_dropped_ffn_adds_nothing() -> None:
    adapter = _build()
    for extractor in (adapter.interactions[0].extractor, adapter.interactions[1].extractor):
        extractor.ffn.register_forward_hook(lambda module, inputs, output: output + 100)
    arguments = (torch.rand(2, 3, 32, 32), torch.rand(2, 4, 16), (2, 2), lambda x, blocks: x)
    factors = torch.zeros(2, adapter.num_extractors)
    with torch.no_grad():
        dropped = adapter(*arguments, factors)
        for extractor in (adapter.interactions[0].extractor, adapter.interactions[1].extractor):
            extractor.ffn.register_forward_hook(lambda module, inputs, output: output * 0)
        again = adapter(*arguments, factors)
    for one, other in zip(dropped, again, strict=True):
        torch.testing.assert_close(one, other)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_heads=3 does not divide"):
        ViTAdapter(AdapterConfig(num_heads=3), 16, 4)
    with pytest.raises(ConfigError, match="exceeds the 3 blocks"):
        ViTAdapter(AdapterConfig(num_heads=2), 16, 3)


def test_interactions_share_the_blocks() -> None:
    assert AdapterConfig().block_ranges(40)[1] == range(10, 20)
    assert AdapterConfig().block_ranges(6) == [range(0, 2), range(2, 4), range(4, 5), range(5, 6)]
