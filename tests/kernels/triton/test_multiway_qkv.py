"""Tests that the kernels of queries, keys and values, interpreted, stay within their error bound."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from beit3_ds.kernels.ops.multiway_qkv import multiway_qkv_reference
from beit3_ds.kernels.ops.numerics import check_against_reference
from beit3_ds.kernels.triton import multiway_ffn_launch
from beit3_ds.kernels.triton.multiway_ffn_launch import MatmulTiles
from beit3_ds.kernels.triton.multiway_qkv_launch import qkv, qkv_input_gradient
from tests.kernels.experts import DTYPES, RAGGED, Case, Slices, any_case
from tests.kernels.interpreter import interpreted

IN, OUT = 20, 12  # neither a multiple of the small tiles' 8: both have a block of 4 that is masked


class ThreeLayers:
    """Holds rows, the gradients of three outputs, and the parameters of three layers for every expert."""

    def __init__(self, slices: Slices, dtype: torch.dtype, in_width: int, out_width: int, device: str = "cpu") -> None:
        case = self.case = Case(slices, dtype, in_width, out_width, device)
        number = 3 * len(slices)
        self.weights = [case.draw(out_width, in_width) / 4 for _ in range(number)]
        self.biases = [case.draw(out_width) for _ in range(number)]
        self.dys = [case.draw(*case.dy.shape) for _ in range(3)]

    def check(self) -> None:
        """Checks the outputs and the input's gradient."""
        case, number = self.case, len(self.weights)

        def forward(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
            return multiway_qkv_reference(x, case.slices, parameters[:number], parameters[number:])

        def input_gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
            dys, weights, experts = tensors[:3], tensors[3:], len(case.slices)
            parts = []
            for expert, (start, stop) in enumerate(case.slices):
                products = [dys[layer][start:stop] @ weights[layer * experts + expert] for layer in range(3)]
                parts.append(products[0] + products[1] + products[2])
            return (torch.cat(parts),)

        outputs = qkv(case.x, case.slices, self.weights, self.biases)
        check_against_reference(("q", "k", "v"), outputs, forward, (case.x, *self.weights, *self.biases))
        dx = qkv_input_gradient(*self.dys, case.slices, self.weights)
        check_against_reference(("dx",), (dx,), input_gradient, (*self.dys, *self.weights))


@contextmanager
def small_tiles() -> Iterator[None]:
    with (
        interpreted(),
        mock.patch.object(multiway_ffn_launch, "choose_tiles", return_value=[MatmulTiles(4, 8, 8, 1, 1)]),
    ):
        yield


@any_case
def test_kernels_follow_the_reference(dtype: torch.dtype, slices: Slices) -> None:
    """Catches weights of another layer or expert, and last columns of a layer that run into the next layer."""
    with small_tiles():
        ThreeLayers(slices, dtype, IN, OUT).check()


def test_other_experts_do_not_matter() -> None:
    """Catches a kernel that reads another expert's rows or weights; NaNs there must change nothing."""
    layers, outputs = ThreeLayers(RAGGED[0], torch.float32, IN, OUT), []
    for value in (0.0, torch.nan):
        for tensor in (layers.case.x, *layers.dys):
            tensor[6:] = value
        for index, parameter in enumerate((*layers.weights, *layers.biases)):
            if index % 3:
                parameter.fill_(value)
        with small_tiles():
            y = qkv(layers.case.x, RAGGED[0], layers.weights, layers.biases)
            dx = qkv_input_gradient(*layers.dys, RAGGED[0], layers.weights)
        outputs.append([tensor[:6] for tensor in (*y, dx)])
    assert all(map(torch.equal, *outputs))


def test_no_rows() -> None:
    layers = ThreeLayers([(0, 0), (0, 0)], torch.float32, IN, OUT)
    with small_tiles():
        assert [x.shape for x in qkv(layers.case.x, layers.case.slices, layers.weights, layers.biases)] == [
            (0, OUT)
        ] * 3
        assert qkv_input_gradient(*layers.dys, layers.case.slices, layers.weights).shape == (0, IN)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shipped_tiles(dtype: torch.dtype) -> None:
    with interpreted():
        ThreeLayers([(0, 130), (130, 131)], dtype, 136, 144).check()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [136, 768, 1408])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_device(dtype: torch.dtype, width: int) -> None:
    for slices in ([(0, 300), (300, 301), (301, 460)], [(0, 0), (0, 200), (200, 200)]):
        ThreeLayers(slices, dtype, width, width, "cuda").check()
