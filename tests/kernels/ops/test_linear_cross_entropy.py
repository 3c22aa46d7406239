"""Tests that cross entropy by vocabulary tiles equals that of full logits, also for a sharded vocabulary."""

from functools import partial

import pytest
import torch
from torch import Tensor

from beit3_ds.kernels.ops import linear_cross_entropy as module
from beit3_ds.kernels.ops import vocabulary_tiles
from beit3_ds.kernels.ops.linear_cross_entropy import (
    Partials,
    check_kernels,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from beit3_ds.kernels.ops.measured_op import CHOICES, Backend
from beit3_ds.kernels.ops.numerics import WrongResultError, check_against_reference, with_gradients
from tests.kernels.ffn_operators import select_on_cpu
from tests.kernels.interpreter import interpreted

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def problem(rows: int, vocab: int = 11, dtype: torch.dtype = torch.float64, width: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    h, w, b = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((rows, width), (vocab, width), (vocab,))
    )
    return h, w, b, torch.randint(0, vocab, (rows,), generator=generator)


def operators(h: Tensor, w: Tensor, b: Tensor, target: Tensor, chunk_size: int | None) -> Tensor:
    """Calls the operators as for CUDA tensors, in their CPU implementation."""
    return module._LinearCrossEntropy.apply(h, w, b, target, chunk_size, None, True)


@pytest.fixture(params=[1, 3, 1024])
def tile_width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets tiles of one column, of a few columns, and of the whole vocabulary."""
    monkeypatch.setattr(vocabulary_tiles, "CPU_WIDTH", request.param)
    monkeypatch.setattr(vocabulary_tiles, "ALIGNMENT", request.param)


@pytest.mark.usefixtures("tile_width")
@pytest.mark.parametrize("op", [linear_cross_entropy, operators])
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("chunk_size", [1, 4, 100, None])
def test_equals_reference(rows: int, chunk_size: int | None, op) -> None:  # type: ignore[no-untyped-def]
    h, w, b, target = problem(rows)
    ours, expected = op(h, w, b, target, chunk_size), linear_cross_entropy_reference(h, w, b, target)
    torch.testing.assert_close(ours, expected)
    upstream = torch.arange(rows, dtype=torch.float64) + 0.5  # catches a gradient that forgets its row's factor
    for mine, theirs in zip(
        torch.autograd.grad((ours * upstream).sum(), (h, w, b)),
        torch.autograd.grad((expected * upstream).sum(), (h, w, b)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.usefixtures("tile_width")
@pytest.mark.parametrize("chunk_size", [2, None])
def test_gradcheck(chunk_size: int | None) -> None:
    """Checks gradients several times on one graph; on a CPU, saved tensors are not modified."""
    h, w, b, target = problem(5, 7)
    assert torch.autograd.gradcheck(lambda *leaves: linear_cross_entropy(*leaves, target, chunk_size), (h, w, b))
    assert torch.autograd.gradcheck(lambda *leaves: linear_cross_entropy_reference(*leaves, target), (h, w, b))


def test_a_graph_on_a_gpu_is_differentiated_once() -> None:
    """Checks that a second backward pass on a GPU raises, because the first overwrites the logits with gradients."""
    h, w, b, target = problem(5, 7)
    loss = operators(h, w, b, target, None).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [linear_cross_entropy, operators])
@pytest.mark.parametrize("chunk_size", [10, None])
def test_both_forms_stay_within_their_error_bound(dtype: torch.dtype, op, chunk_size: int | None, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(vocabulary_tiles, "CPU_WIDTH", 64)
    *leaves, target = problem(60, 500, dtype, 16)
    h, w, b = (x.detach() for x in leaves)
    inputs = (h, w / 4, b, torch.linspace(-1, 2, 60, dtype=dtype))  # logits of about 1
    ours = with_gradients(lambda *x: op(*x, target, chunk_size))(*inputs)
    check_against_reference(
        ("loss", "dh", "dw", "db"),
        ours,
        with_gradients(partial(linear_cross_entropy_reference, target_M=target)),
        inputs,
    )
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype, dtype]


@pytest.mark.parametrize("op", [linear_cross_entropy, operators])
def test_large_logits_do_not_overflow(op) -> None:  # type: ignore[no-untyped-def]
    h, w, b, target = problem(3, dtype=torch.float32)
    loss = op(h * 1e3, w, b, target, 2)
    assert torch.isfinite(loss).all()
    torch.testing.assert_close(loss, linear_cross_entropy_reference(h * 1e3, w, b, target))


@pytest.mark.usefixtures("tile_width")
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("chunk_size", [2, None])
def test_partials_of_a_sharded_vocabulary_add_up(kernels: bool, chunk_size: int | None) -> None:
    """Catches a target counted by two shards or none, and partial results that are not relative to all shards."""
    *leaves, target = problem(6)
    h, w, b = (t.detach() for t in leaves)
    upstream, cut = torch.rand(6, dtype=torch.float64), 4
    b[cut:] += 800  # exp of the difference between shards is 0, and its reciprocal infinite
    shards = [(w[:cut], b[:cut], target), (w[cut:], b[cut:], target - cut)]
    own: list[Partials] = []

    def joined() -> Partials:
        top = torch.maximum(own[0].largest, own[1].largest)
        total = sum(part.total * (part.largest - top).exp() for part in own)
        return Partials(top, total, own[0].target_logit + own[1].target_logit)

    results = []
    for shard_w, shard_b, shard_target in shards:
        module._LinearCrossEntropy.apply(
            h, shard_w, shard_b, shard_target, chunk_size, lambda p: own.append(p) or p, kernels
        )
    for shard_w, shard_b, shard_target in shards:
        leaves = [x.clone().requires_grad_() for x in (h, shard_w, shard_b)]
        arguments = (shard_target, chunk_size, lambda _: joined(), kernels)
        loss = module._LinearCrossEntropy.apply(*leaves, *arguments)
        results.append((loss, *torch.autograd.grad(loss, leaves, upstream)))
    whole = [x.clone().requires_grad_() for x in (h, w, b)]
    loss = linear_cross_entropy_reference(*whole, target)
    dh, dw, db = torch.autograd.grad(loss, whole, upstream)
    for result in results:
        torch.testing.assert_close(result[0], loss)
    torch.testing.assert_close(results[0][1] + results[1][1], dh)
    torch.testing.assert_close(torch.cat([result[2] for result in results]), dw)
    torch.testing.assert_close(torch.cat([result[3] for result in results]), db)


@pytest.mark.parametrize("op", [linear_cross_entropy, operators])
@pytest.mark.parametrize("rows", [64, 7])
def test_full_logits_never_exist(op, rows: int) -> None:  # type: ignore[no-untyped-def]
    """Catches a tensor larger than the logits of one chunk of rows."""
    vocab, chunk = 2048, 8
    h, w, b, target = problem(rows, vocab)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        op(h, w, b, target, chunk).sum().backward()
    assert largest <= max(chunk * vocab, w.numel())


def test_saves_the_parameters_themselves() -> None:
    """Catches a saved view or cast: ZeRO-3 replaces a parameter's storage before the backward pass."""
    h, w, b, target = problem(5)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _loss = linear_cross_entropy(h, w, b, target, 2)
    assert all(any(t is parameter for t in saved) for parameter in (w, b))


@pytest.mark.parametrize("backend", ["triton", "library"])
def test_launches_of_a_device(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the operators' implementations for GPU tensors, with two vocabulary tiles."""
    for operator in (module._PARTIALS, module._GRADIENT):
        select_on_cpu(operator, monkeypatch)
    *leaves, target = problem(5, 100, torch.float32)
    inputs = (*(x.detach() for x in leaves), torch.linspace(-1, 2, 5))
    with interpreted(), CHOICES.fixed(backend):
        ours = with_gradients(lambda *x: operators(*x, target, 4))(*inputs)
    reference = with_gradients(partial(linear_cross_entropy_reference, target_M=target))
    check_against_reference(("loss", "dh", "dw", "db"), ours, reference, inputs)


def test_self_check(recwarn: pytest.WarningsRecorder) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_kernels(CPU, dtype)
    assert not recwarn


@pytest.mark.parametrize("wrong", ["partials", "d_logits", "d_bias"])
def test_self_check_finds_wrong_kernels(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def partials(*arguments):  # type: ignore[no-untyped-def]
        module._partials_library(*arguments)
        if wrong == "partials":
            arguments[-1][1] *= 1.01

    def gradient(logits, *arguments):  # type: ignore[no-untyped-def]
        total = module._gradient_library(logits, *arguments)
        if wrong == "d_logits":
            logits *= 1.001
        return total * 1.001 if wrong == "d_bias" else total

    monkeypatch.setattr(module, "_PARTIALS", partials)
    monkeypatch.setattr(module, "_GRADIENT", gradient)
    with pytest.raises(WrongResultError):
        check_kernels(CPU, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk_size", [128, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_device(dtype: torch.dtype, chunk_size: int | None) -> None:
    *leaves, target = (x.to("cuda") for x in problem(350, 64010, dtype, 768))
    inputs = (leaves[0].detach(), leaves[1].detach() / 28, leaves[2].detach(), torch.rand(350, device="cuda").to(dtype))
    assert module.KERNELS.accept(inputs[0])
    ours = with_gradients(lambda *x: linear_cross_entropy(*x, target, chunk_size))(*inputs)
    reference = with_gradients(partial(linear_cross_entropy_reference, target_M=target))
    check_against_reference(("loss", "dh", "dw", "db"), ours, reference, inputs)
