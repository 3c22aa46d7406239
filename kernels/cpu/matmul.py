"""Computes the matrix products of linear layers on a CPU, and writes each product into a given tensor.

PyTorch multiplies float32 matrices with MKL. For many rows, oneDNN is often 10 to 33 % faster (BENCHMARKS.md). PyTorch
offers oneDNN only for convolutions, so this module computes a product as a 1 x 1 convolution.
"""

# R rows, D input width, F output width.

import torch
from torch import Tensor

from beit3_ds.kernels.cpu.allocator import ALLOCATOR
from beit3_ds.kernels.ops.numerics import check_against_reference
from beit3_ds.kernels.ops.self_check import TrustedKernels

_FEWEST_ROWS = 256
"""Minimum rows for oneDNN. For fewer rows, oneDNN's internal copy of the weight matrix takes too long."""
_FEWEST_ROWS_TRANSPOSED = 1024
"""Minimum rows for oneDNN if only the transpose of the weight matrix is contiguous."""
_STRIP, _STRIP_OF_LONG_ROWS, _LONG_ROW = 512, 16, 2048
"""Number of rows that `_transpose` copies at a time: `_STRIP`, or `_STRIP_OF_LONG_ROWS` if the matrix has at least
`_LONG_ROW` columns. With so many columns, the elements of a column lie so far apart that they compete for the same
cache lines."""


def matmul(x_RD: Tensor, w_FD: Tensor, b_F: Tensor | None, out_RF: Tensor) -> Tensor:
    """Writes x @ w.T + b into `out_RF` and returns `out_RF`. All tensors have one dtype.

    Args:
        x_RD: input rows, contiguous.
        w_FD: weight matrix; either the matrix or its transpose is contiguous.
        b_F: bias, contiguous, or None.
        out_RF: output rows, contiguous.
    """
    if _takes_onednn(x_RD, w_FD):
        _add_by_onednn(x_RD, w_FD, b_F, out_RF.zero_())
        return out_RF
    if b_F is None:
        return torch.mm(x_RD, w_FD.t(), out=out_RF)
    return torch.addmm(b_F, x_RD, w_FD.t(), out=out_RF)


def _takes_onednn(x_RD: Tensor, w_FD: Tensor) -> bool:
    fewest = _FEWEST_ROWS if w_FD.is_contiguous() else _FEWEST_ROWS_TRANSPOSED
    is_supported = x_RD.dtype is torch.float32 and x_RD.device.type == "cpu" and len(x_RD) >= fewest
    return is_supported and _has_onednn()


def _add_by_onednn(x_RD: Tensor, w_FD: Tensor, b_F: Tensor | None, out_RF: Tensor) -> None:
    if not w_FD.is_contiguous():
        w_FD = _transpose(w_FD.t())
    # Rows are the pixels of one image in channels-last order.
    x_1DR1, out_1FR1 = (rows.unflatten(0, (1, -1, 1)).permute(0, 3, 1, 2) for rows in (x_RD, out_RF))
    form = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups
    add = torch.ops.mkldnn._convolution_pointwise_.binary
    add(out_1FR1, x_1DR1, w_FD[:, :, None, None], b_F, *form, "add", 1.0, None, [], None)


def _transpose(x_RD: Tensor) -> Tensor:
    """Returns a contiguous copy of x.T.

    The function copies strips of rows, because PyTorch uses only one thread to copy a whole transposed matrix
    (BENCHMARKS.md).
    """
    out_DR = ALLOCATOR.empty(x_RD, x_RD.shape[1], len(x_RD))
    rows = _STRIP_OF_LONG_ROWS if x_RD.shape[1] >= _LONG_ROW else _STRIP
    for strip_rD, out_Dr in zip(x_RD.split(rows), out_DR.split(rows, dim=1), strict=True):
        out_Dr.copy_(strip_rD.t())
    return out_DR


def _has_onednn() -> bool:
    # The operator is not public: PyTorch's compiler uses it, and another version may change its arguments.
    return torch.backends.mkldnn.is_available() and _ONEDNN.are_trusted(torch.device("cpu"), torch.float32)


def _check_onednn(device: torch.device, dtype: torch.dtype) -> None:
    """Compares products from oneDNN with plain PyTorch, for a contiguous and for a transposed weight matrix.

    Raises:
        WrongResultError: if a result is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    x_RD, square, b_F = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((9, 16), (16, 16), (16,)))
    for w_FD in (square, square.t()):
        out_RF = torch.ones(9, 16, dtype=dtype)
        _add_by_onednn(x_RD, w_FD, b_F, out_RF)
        check_against_reference(("product",), (out_RF,), lambda x, w, b: (1 + x @ w.t() + b,), (x_RD, w_FD, b_F))


_ONEDNN = TrustedKernels("matmul by oneDNN", _check_onednn)
