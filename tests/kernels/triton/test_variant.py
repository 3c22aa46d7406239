"""Tests variants of kernels for ahead-of-time compilation."""

import pytest
import triton
import triton.language as tl

from beit3_ds.kernels.triton.variant import build_variant


@triton.jit
def add_kernel(x_ptr, y_ptr, N: tl.constexpr, size):  # type: ignore[no-untyped-def]
    """Adds x to y."""


def test_signature_has_the_kernels_order() -> None:
    types = {"size": "i32", "y_ptr": "*bf16", "x_ptr": "*fp32"}
    variant = build_variant("add", add_kernel, types, {"N": 8}, num_warps=4, num_stages=2)
    assert list(variant.signature.items()) == [
        ("x_ptr", "*fp32"),
        ("y_ptr", "*bf16"),
        ("N", "constexpr"),
        ("size", "i32"),
    ]


def test_missing_and_unknown_arguments_are_named() -> None:
    types = {"x_ptr": "*fp32", "y_ptr": "*bf16", "z_ptr": "*bf16"}
    with pytest.raises(AssertionError, match=r"add: arguments \['size', 'z_ptr'\] are missing or unknown"):
        build_variant("add", add_kernel, types, {"N": 8}, num_warps=4, num_stages=2)
