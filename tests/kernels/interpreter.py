"""Runs kernels in Triton's interpreter, in which NumPy executes their source on CPU tensors.

The interpreter finds wrong values, masks and indices, but no errors of layouts, races or asynchronous copies.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction


@contextmanager
def interpreted() -> Iterator[None]:
    """Runs every kernel that the block launches in the interpreter.

    `TRITON_INTERPRET=1`, set before Triton is imported, does the same for a whole process, but then no test can compile
    kernels. The interpreter of the pinned Triton has two mistakes, which this function corrects. It multiplies the bits
    of bfloat16 as integers, and it truncates instead of rounding to nearest even (triton-lang/triton#11585, #10945). A
    load or store outside the launch's tensors is an error here; the interpreter alone would access the memory or crash.
    """
    builder = interpreter.InterpreterBuilder
    allowed: list[tuple[int, int]] = []
    patched: set[str] = set()

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        storages = [x.untyped_storage() for x in args if isinstance(x, torch.Tensor)]
        allowed[:] = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
        patched.clear()
        _interpreted(self.fn).run(*args, **kwargs)

    def call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        # The interpreter patches the language at every call of a function: a third of the time. Once per launch and
        # module is enough, because all functions of a module see the same language.
        module = self.fn.__globals__["__name__"]
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return _interpreted(self.fn).rewrite()(*args, **kwargs)

    replacements = [
        (JITFunction, "__call__", call),
        (JITFunction, "run", run),
        (builder, "create_masked_load", _bounded(builder.create_masked_load, allowed, mask_argument=1)),
        (builder, "create_masked_store", _bounded(builder.create_masked_store, allowed, mask_argument=2)),
        (builder, "create_dot", _dot(builder.create_dot)),
        (builder, "cast_impl", _cast(builder.cast_impl)),
        (builder, "create_fp_to_fp", _cast(builder.create_fp_to_fp)),
    ]
    with _language_restored(), ExitStack() as stack:
        for owner, name, replacement in replacements:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


@contextmanager
def _language_restored() -> Iterator[None]:
    """Restores everything that the interpreter replaces in `triton.language`.

    The interpreter does not restore functions that a kernel calls, such as `tl.cdiv`. Without this, the process could
    compile no kernel afterwards.
    """
    originals: dict[tuple[int, str], tuple[Any, str, Any]] = {}
    set_attr = interpreter._LangPatchScope.set_attr

    def record(self: Any, owner: Any, name: str, value: Any) -> None:
        originals.setdefault((id(owner), name), (owner, name, getattr(owner, name, None)))
        set_attr(self, owner, name, value)

    try:
        with mock.patch.object(interpreter._LangPatchScope, "set_attr", record):
            yield
    finally:
        for owner, name, original in originals.values():
            if original is not None:
                setattr(owner, name, original)
            elif hasattr(owner, name):
                delattr(owner, name)


@cache
def _interpreted(function: Callable[..., Any]) -> interpreter.InterpretedFunction:
    return interpreter.InterpretedFunction(function)


def _bounded(original: Any, allowed: list[tuple[int, int]], mask_argument: int) -> Any:
    def access(self: Any, pointers: Any, *rest: Any, **options: Any) -> Any:
        addresses = pointers.data[np.broadcast_to(rest[mask_argument - 1].data, pointers.data.shape)]
        if addresses.size:
            first, last = int(addresses.min()), int(addresses.max()) + pointers.get_element_ty().primitive_bitwidth // 8
            inside = any(start <= first and last <= stop for start, stop in allowed)
            assert inside, "a kernel reads or writes outside of its tensors"
        return original(self, pointers, *rest, **options)

    return access


def _dot(original: Any) -> Any:
    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return original(self, _widened(a), _widened(b), d, *rest)

    return dot


def _cast(original: Any) -> Any:
    def cast(self: Any, source: Any, target: Any, *rest: Any) -> Any:
        from_type, to_type = source.dtype.scalar, target.scalar
        if from_type == tl.bfloat16 and to_type != tl.bfloat16:
            return original(self, _widened(source), target, *rest)
        if to_type == tl.bfloat16 and from_type == tl.float32:
            rounded = torch.from_numpy(np.array(source.data, np.float32)).to(torch.bfloat16)
            return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return original(self, source, target, *rest)

    return cast


def _widened(x: Any) -> Any:
    """Converts bfloat16, which the interpreter stores as integers, to float32; returns other dtypes unchanged."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
