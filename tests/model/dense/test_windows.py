"""Compares outputs and gradients of the packed model with a model that pads, divides and masks windows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from beit3_ds.data.packing import pack_grids
from beit3_ds.model.dense.canvas import from_canvas, to_canvas
from beit3_ds.patch_grids import Grids
from tests.gradient_order import gradient_order
from tests.model.dense.dense_models import build_dense, dense_config, random_images
from tests.model.dense.plain_windows import plain_maps

GRIDS = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3).map(tuple)


@settings(max_examples=25, deadline=None)
@given(GRIDS, st.integers(0, 4), st.booleans(), st.booleans())
def test_equals_padded_and_masked_windows(
    grids: Grids, window_size: int, relative_positions: bool, is_decoupled: bool
) -> None:
    """Catches patches in a wrong window or place, attention to padding, and wrong relative positions."""
    compare_with_plain(grids, window_size, relative_positions, is_decoupled, torch.float64, 1e-11)


@pytest.mark.parametrize(
    ("grids", "window_size"),
    [
        (((6, 6),), 3),  # divides
        (((5, 7), (1, 1), (4, 3)), 3),  # larger than the tables of positions, and tiny
        (((4, 4), (4, 4)), 0),
    ],
)
@pytest.mark.parametrize("relative_positions", [False, True])
def test_equals_padded_and_masked_windows_in_float32(grids: Grids, window_size: int, relative_positions: bool) -> None:
    compare_with_plain(grids, window_size, relative_positions, True, torch.float32, 1e-5)


def compare_with_plain(
    grids: Grids,
    window_size: int,
    relative_positions: bool,
    is_decoupled: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    layout = {"layout": "decoupled", "sub_layernorm": True, "num_vision_language_layers": 0} if is_decoupled else {}
    config = dense_config(window_size, (1,) if window_size else (), relative_positions, **layout)
    model, images = build_dense(config).to(dtype), random_images(grids)
    batch = pack_grids(images, config.patch_size)
    maps = to_canvas(model(batch), batch.image_grids, window_size)
    parameters = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    expected = [plain_maps(parameters, config, image.double()) for image in images]
    loss, expected_loss = torch.zeros(()), torch.zeros(())
    for number, x in enumerate(expected):
        ours = maps[number, :, : x.shape[0], : x.shape[1]].permute(1, 2, 0)
        assert_near(ours, x, tolerance)
        assert maps[number].count_nonzero() == ours.count_nonzero(), "places outside of an image are zero"
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        loss, expected_loss = loss + (ours * weight).sum(), expected_loss + (x * weight).sum()
    loss.backward()
    expected_loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if "k_proj.bias" not in name:  # its exact gradient is zero: it adds the same to all scores of a query
            assert_near(parameter.grad, parameters[name].grad, tolerance)


def assert_near(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compares tensors with a tolerance relative to the largest value."""
    scale = expected.abs().max().clamp(min=1)
    torch.testing.assert_close(ours.double() / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("window_size", [0, 3])
def test_rows_and_maps_are_inverse(window_size: int) -> None:
    grids = ((5, 7), (3, 2))
    rows = torch.randn(41, 6)
    maps = to_canvas(rows, grids, window_size)
    assert maps.shape == (2, 6, 5, 7)
    assert torch.equal(from_canvas(maps, grids, window_size), rows)


def test_batch_without_images_reaches_all_parameters() -> None:
    """Catches a parameter without gradient, which ZeRO-3 would update with an old gradient."""
    config = dense_config()
    model = build_dense(config)
    y_TD = model(pack_grids([], config.patch_size))
    assert y_TD.shape == (0, config.hidden_size)
    y_TD.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_order_of_gradients_does_not_depend_on_the_images() -> None:
    """Catches tables of relative positions whose gradients come in another order where an image is larger than they."""
    config = dense_config()
    model = build_dense(config)
    orders = [
        gradient_order(model, lambda grids=grids: model(pack_grids(random_images(grids), config.patch_size)).sum())
        for grids in ((), ((4, 4),), ((6, 4),), ((4, 6),), ((6, 6), (2, 5), (7, 3)))
    ]
    assert len(orders[0]) == len(list(model.parameters()))
    assert all(order == orders[0] for order in orders)
