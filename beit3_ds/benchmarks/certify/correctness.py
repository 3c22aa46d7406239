"""Checks every op on this device against a float64 reference, and checks that two runs give identical bits."""

# T packed rows, D hidden, F ffn hidden, H heads, K head width, M rows of a head, V vocabulary.

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_ds.benchmarks.certify.device_kind import kind_of
from beit3_ds.benchmarks.certify.recorder import Recorder
from beit3_ds.benchmarks.turns import device_of_turns
from beit3_ds.kernels.ops import (
    activation_norm,
    cuda_kernels,
    linear_cross_entropy,
    multiway_layer_norm,
    multiway_linear,
    multiway_qkv,
    out_projection,
    packed_attention,
    residual_add,
    sub_norm,
    up_projection,
)
from beit3_ds.kernels.ops.measured_op import CHOICES, Backend
from beit3_ds.kernels.ops.numerics import WrongResultError, check_against_reference, with_gradients
from beit3_ds.kernels.ops.sub_norm import SubNorm

_DTYPES = (torch.bfloat16, torch.float32, torch.float16)
_HALF = (torch.bfloat16, torch.float16)
_HEADS, _WIDTHS = (64, 88), (768, 1408)
_SLICES = ((0, 90), (90, 90), (90, 133))
_EXPERTS = len(_SLICES)
_CHECKED = (
    *(multiway_linear, multiway_qkv, up_projection, activation_norm, out_projection, sub_norm),
    linear_cross_entropy,
)


class Op(NamedTuple):
    """Describes one variant of an op, with a reference and the shapes of the inputs."""

    name: str
    """Name of the op and the variant."""
    ours: Callable[..., Tensor]
    """This project's op, called as in the model."""
    reference: Callable[..., Tensor]
    """Reference in plain PyTorch, which takes the op's inputs and returns the op's output."""
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the inputs that need gradients."""


def measure(recorder: Recorder) -> None:
    """Records a check of each op with each backend, dtype and alignment.

    On a GPU, records the kernels' self-checks first.
    """
    device = device_of_turns()
    on_gpu = kind_of(device) != "cpu"
    for name, check in _kernel_checks(device) if on_gpu else ():
        recorder.measure(name, partial(_passes, check))
    backends: tuple[Backend, ...] = ("triton", "library", "cuda", "auto") if on_gpu else ("auto",)
    for backend in backends:
        if backend == "cuda" and not cuda_kernels.is_built():
            recorder.measure("kernels in CUDA C++", lambda: {"not_run": "they are not built (docs/kernels_cuda.md)"})
            continue
        for dtype in _DTYPES:
            for op in _ops(small=not on_gpu):
                for is_aligned in (True, False):
                    layout = "aligned" if is_aligned else "unaligned"
                    item = f"{op.name}, {_name(dtype)}, {backend if on_gpu else 'CPU form'}, {layout}"
                    recorder.measure(item, partial(_check, op, device, dtype, backend, is_aligned))


def _kernel_checks(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields the name and the function of each op's self-check.

    The self-checks test this project's kernels. In half precision, they also test PyTorch's variable-length attention.
    """
    for dtype in _DTYPES:
        for module in _CHECKED:
            name = module.__name__.rpartition(".")[2]
            yield f"check of {name}, {_name(dtype)}", partial(module.check_kernels, device, dtype)
        for row_op in (multiway_layer_norm, residual_add):
            for width in _WIDTHS:
                for stream in dict.fromkeys((dtype, torch.float32)):
                    name = f"check of {row_op.__name__.rpartition('.')[2]}, {_name(dtype)}, width {width}"
                    check = partial(row_op.check_kernels, device, dtype, width, stream)
                    yield f"{name}, stream {_name(stream)}", check
        for head in _HEADS:
            name = f"check of packed_attention, {_name(dtype)}, heads of {head}"
            yield name, partial(packed_attention.check_kernels, device, dtype, head)
            if dtype in _HALF:
                yield f"{name}, varlen", partial(packed_attention.check_varlen, device, dtype, head)
                if cuda_kernels.is_built():
                    yield f"{name}, CUDA C++", partial(packed_attention.check_kernels, device, dtype, head, True)


def _passes(check: Callable[[], None]) -> dict[str, Any]:
    """Runs a self-check; returns whether it passed and, if not, what is wrong.

    Errors of compilation or launch are not caught.
    """
    with CHOICES.fixed("triton"), torch.enable_grad():
        try:
            check()
        except WrongResultError as error:
            return {"passed": False, "wrong": str(error)}
    return {"passed": True}


def _check(op: Op, device: torch.device, dtype: torch.dtype, backend: Backend, is_aligned: bool) -> dict[str, Any]:
    """Compares an op's output and gradients with the reference, and checks that a second run gives identical bits."""
    generator = torch.Generator().manual_seed(0)
    inputs = [_place(torch.randn(shape, generator=generator) / 4, device, dtype, is_aligned) for shape in op.shapes]
    y = op.reference(*inputs)
    inputs.append(torch.randn(y.shape, generator=generator).to(device, y.dtype) / 4)
    names = ("y", *(f"gradient {index}" for index in range(len(op.shapes))))
    with CHOICES.fixed(backend):
        first, second = (with_gradients(op.ours)(*inputs) for _ in range(2))
    if kind_of(device) == "dry":
        return {"ran": True}
    equal_bits = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    try:
        check_against_reference(names, first, with_gradients(op.reference), inputs)
    except WrongResultError as error:
        return {"passed": False, "wrong": str(error), "equal_bits": equal_bits}
    return {"passed": equal_bits, "equal_bits": equal_bits}


def _place(x: Tensor, device: torch.device, dtype: torch.dtype, is_aligned: bool) -> Tensor:
    """Returns a copy of a tensor on a device. The copy may be unaligned, like parameters in ZeRO's flat buffers.

    An unaligned copy starts one element after an address that is a multiple of 16 bytes.
    """
    buffer = torch.empty(x.numel() + 1, device=device, dtype=dtype)
    placed = (buffer[:-1] if is_aligned else buffer[1:]).view(x.shape)
    return placed.copy_(x)


def _ops(small: bool) -> Iterator[Op]:
    rows = _SLICES[-1][1]
    for head in _HEADS:
        heads = 2 if small else 4
        yield _attention(rows, heads, head, causal=False)
        if head == _HEADS[0]:
            yield _attention(rows, heads, head, causal=True)
    for width in (96,) if small else _WIDTHS:
        yield _linear(rows, width)
        yield _qkv(rows, width)
        for with_norm in (False, True):
            yield _ffn(rows, width, with_norm)
        yield _norm(rows, width)
        yield _residual(rows, width)
    yield _cross_entropy(40, 96, 501 if small else 5003)


def _attention(rows: int, heads: int, head: int, causal: bool) -> Op:
    ranges = (((0, 90), (100, rows)), ((90, 91),), ((91, 100),))
    shape = (rows, heads, head)
    return Op(
        f"packed_attention, heads of {head}{', causal captions' if causal else ''}",
        partial(packed_attention.packed_attention, ranges=ranges, causal_captions=causal),
        partial(packed_attention.packed_attention_reference, ranges=ranges, causal_captions=causal),
        (shape, shape, shape),
    )


def _linear(rows: int, width: int) -> Op:
    def run(function: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        return function(x, _SLICES, parameters[:_EXPERTS], parameters[_EXPERTS:])

    shapes = ((rows, width), *[(width, width)] * _EXPERTS, *[(width,)] * _EXPERTS)
    ours, reference = multiway_linear.multiway_linear, multiway_linear.multiway_linear_reference
    return Op(f"multiway_linear, width {width}", partial(run, ours), partial(run, reference), shapes)


def _qkv(rows: int, width: int) -> Op:
    number = multiway_qkv.NUM_LAYERS * _EXPERTS

    def run(function: Callable[..., Sequence[Tensor]], x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.cat(list(function(x, _SLICES, parameters[:number], parameters[number:])), 1)

    ours, reference = multiway_qkv.multiway_qkv, multiway_qkv.multiway_qkv_reference
    shapes = ((rows, width), *[(width, width)] * number, *[(width,)] * number)
    return Op(f"multiway_qkv, width {width}", partial(run, ours), partial(run, reference), shapes)


def _ffn(rows: int, width: int, with_norm: bool) -> Op:
    inner = 4 * width
    kinds = ((inner, width), (inner,), (inner,), (inner,), (width, inner), (width,))

    def split(parameters: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        return [tuple(parameters[_EXPERTS * i : _EXPERTS * (i + 1)]) for i in range(len(kinds))]

    def norm_of(scales: Sequence[Tensor], shifts: Sequence[Tensor]) -> SubNorm | None:
        return SubNorm(scales, shifts, 1e-5, inner) if with_norm else None

    def factor(h: Tensor) -> Tensor:
        return (torch.arange(len(h), device=h.device) % 7 > 0).to(h.dtype)

    def unused(scales: Sequence[Tensor], shifts: Sequence[Tensor]) -> Any:
        return 0 if with_norm else sum((x * 0).sum() for x in (*scales, *shifts))  # every input needs a gradient

    def ours(h: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
        w1, b1, scales, shifts, w2, b2 = split(parameters)
        activation = up_projection.up_projection(h, _SLICES, w1, b1, has_norm=with_norm)
        joined = {"residual_TD": residual, "factor_T": factor(h)}
        norm = norm_of(scales, shifts)
        y = out_projection.out_projection(activation, _SLICES, w2, b2, gelu=True, norm=norm, **joined)
        return y + unused(scales, shifts)

    def reference(h: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
        w1, b1, scales, shifts, w2, b2 = split(parameters)
        x = multiway_linear.multiway_linear_reference(h, _SLICES, w1, b1)
        joined = {"residual_TD": residual, "factor_T": factor(h)}
        norm = norm_of(scales, shifts)
        y = out_projection.out_projection_reference(x, _SLICES, w2, b2, gelu=True, norm=norm, **joined)
        return y + unused(scales, shifts)

    shapes = ((rows, width), (rows, width), *(shape for shape in kinds for _ in range(_EXPERTS)))
    return Op(f"FFN{' with sub-LN' if with_norm else ''}, width {width}", ours, reference, shapes)


def _norm(rows: int, width: int) -> Op:
    def run(function: Callable[..., tuple[Tensor, Tensor]], x: Tensor, *parameters: Tensor) -> Tensor:
        return function(x, _SLICES, parameters[:_EXPERTS], parameters[_EXPERTS:], 1e-5)[1]

    ours, reference = multiway_layer_norm.multiway_layer_norm, multiway_layer_norm.multiway_layer_norm_reference
    shapes = ((rows, width), *[(width,)] * (2 * _EXPERTS))
    return Op(f"multiway_layer_norm, width {width}", partial(run, ours), partial(run, reference), shapes)


def _residual(rows: int, width: int) -> Op:
    def run(function: Callable[..., Tensor], residual: Tensor, branch: Tensor, *biases: Tensor) -> Tensor:
        factor = (torch.arange(rows, device=branch.device) % 7 > 0).to(branch.dtype)
        return function(residual, branch, _SLICES, biases, factor)

    ours, reference = residual_add.residual_add, residual_add.residual_add_reference
    shapes = ((rows, width), (rows, width), *[(width,)] * _EXPERTS)
    return Op(f"residual_add, width {width}", partial(run, ours), partial(run, reference), shapes)


def _cross_entropy(rows: int, width: int, vocabulary: int) -> Op:
    def run(function: Callable[..., Tensor], h: Tensor, w: Tensor, b: Tensor, *rest: Any) -> Tensor:
        return function(h, w, b, (torch.arange(rows, device=h.device) * 37) % vocabulary, *rest)

    def ours(*inputs: Tensor) -> Tensor:
        return run(linear_cross_entropy.linear_cross_entropy, *inputs, 16)

    reference = partial(run, linear_cross_entropy.linear_cross_entropy_reference)
    return Op(
        f"linear_cross_entropy, {vocabulary} words",
        ours,
        reference,
        ((rows, width), (vocabulary, width), (vocabulary,)),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
