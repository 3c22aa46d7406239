"""A linear layer's products on a CPU, into memory that is given.

PyTorch multiplies matrices of float32 with MKL. oneDNN, which it has for convolutions, is often faster by a tenth
to a third where rows are many (BENCHMARKS.md), and reaches such memory as a convolution of single pixels that adds to
what is there.
"""

# R rows, D input width, F output width.

from functools import lru_cache

import torch
from torch import Tensor

from beit3_ds.kernels.cpu.host_memory import empty
from beit3_ds.kernels.ops.numerics import check_rule
from beit3_ds.kernels.ops.self_check import passes

_FEWEST_ROWS = 256
"""For fewer rows, oneDNN's copy of the matrix, in an order of its own, takes longer than it saves."""
_FEWEST_ROWS_TRANSPOSED = 1024
"""The same where the copy is of a transposed matrix."""
_STRIP, _STRIP_OF_LONG_ROWS, _LONG_ROW = 512, 16, 2048
"""Rows that are transposed at a time. Of long rows the elements of a column lie so far apart that they compete for the
same lines of the cache."""


def product(x_RD: Tensor, w_FD: Tensor, b_F: Tensor | None, out_RF: Tensor) -> Tensor:
    """Writes x @ w.T, plus a bias if there is one, into `out_RF` and returns it.

    Args:
        x_RD: rows.
        w_FD: the matrix; its transpose serves as well.
        b_F: the bias.
        out_RF: contiguous, of x's dtype, like x_RD and b_F.
    """
    if _takes_onednn(x_RD, w_FD):
        _add_by_onednn(x_RD, w_FD, b_F, out_RF.zero_())
        return out_RF
    if b_F is None:
        return torch.mm(x_RD, w_FD.t(), out=out_RF)
    return torch.addmm(b_F, x_RD, w_FD.t(), out=out_RF)


def _takes_onednn(x_RD: Tensor, w_FD: Tensor) -> bool:
    fewest = _FEWEST_ROWS if w_FD.is_contiguous() else _FEWEST_ROWS_TRANSPOSED
    is_its_kind = x_RD.dtype is torch.float32 and x_RD.device.type == "cpu" and len(x_RD) >= fewest
    return is_its_kind and _has_onednn()


def _add_by_onednn(x_RD: Tensor, w_FD: Tensor, b_F: Tensor | None, out_RF: Tensor) -> None:
    if not w_FD.is_contiguous():
        w_FD = _transpose(w_FD.t())
    # Rows are pixels of one image, whose channels lie side by side.
    x_1DR1, out_1FR1 = (rows.unflatten(0, (1, -1, 1)).permute(0, 3, 1, 2) for rows in (x_RD, out_RF))
    form = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups
    add = torch.ops.mkldnn._convolution_pointwise_.binary
    add(out_1FR1, x_1DR1, w_FD[:, :, None, None], b_F, *form, "add", 1.0, None, [], None)


def _transpose(x_RD: Tensor) -> Tensor:
    """x.T, contiguous; in one piece PyTorch copies it with one thread, as it would for oneDNN (BENCHMARKS.md)."""
    out_DR = empty(x_RD, x_RD.shape[1], len(x_RD))
    rows = _STRIP_OF_LONG_ROWS if x_RD.shape[1] >= _LONG_ROW else _STRIP
    for strip_rD, out_Dr in zip(x_RD.split(rows), out_DR.split(rows, dim=1), strict=True):
        out_Dr.copy_(strip_rD.t())
    return out_DR


@lru_cache
def _has_onednn() -> bool:
    # The operator is one that PyTorch's compiler uses, not a public one.
    is_built = torch.backends.mkldnn.is_available()
    return is_built and passes("A product by oneDNN", torch.device("cpu"), _check_onednn)


def _check_onednn() -> None:
    """Holds it to a product by MKL, of a matrix and of a transposed one."""
    generator = torch.Generator().manual_seed(0)
    x_RD, square, b_F = (torch.randn(*shape, generator=generator) for shape in ((9, 16), (16, 16), (16,)))
    for w_FD in (square, square.t()):
        out_RF = torch.ones(9, 16)
        _add_by_onednn(x_RD, w_FD, b_F, out_RF)
        check_rule(("product",), (out_RF,), lambda x, w, b: (1 + x @ w.t() + b,), (x_RD, w_FD, b_F))
