"""Splits a plain value into JSON and CPU tensors for sending to another rank, and rebuilds the value. Nothing is
pickled.
"""

import json
from typing import Any

import torch
from torch import Size, Tensor

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.bfloat16, torch.float16, torch.float32, torch.float64),
    )
}


def pack(value: Any) -> tuple[bytes, list[Tensor]]:
    """Splits a value into JSON and a list of contiguous CPU tensors.

    Args:
        value: None, a bool, an int, a float, a string, a tensor, or a list, tuple, `torch.Size` or dict of such values.
            Dict keys must be strings. NaN, infinities and strings with invalid Unicode are preserved.

    Raises:
        TypeError: if a value has another type, or a tensor is not on the CPU.
    """
    tensors: list[Tensor] = []
    body = _to_json(value, tensors)
    kinds = [[str(tensor.dtype).removeprefix("torch."), *tensor.shape] for tensor in tensors]
    return json.dumps([kinds, body], separators=(",", ":")).encode("ascii"), tensors


def allocate_tensors(header: bytes) -> list[Tensor]:
    """Creates an uninitialized tensor for each tensor in the JSON from `pack`, with the same shape and dtype."""
    kinds, _ = json.loads(header)
    return [torch.empty(shape, dtype=_DTYPES[dtype]) for dtype, *shape in kinds]


def unpack(header: bytes, tensors: list[Tensor]) -> Any:
    """Rebuilds a value from the JSON and the tensors that `pack` returned."""
    _, body = json.loads(header)
    return _from_json(body, tensors)


def as_bytes(tensor: Tensor) -> Tensor:
    """Views the memory of a contiguous tensor as a one-dimensional uint8 tensor, without copying."""
    # A tensor of at most one element is contiguous with any stride, but a view as bytes needs stride 1.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _to_json(value: Any, tensors: list[Tensor]) -> Any:
    # A type that JSON lacks becomes a list that begins with the type's name. So plain lists begin with "list".
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Tensor():
            if value.device.type != "cpu":
                raise TypeError(f"a tensor on {value.device} is not a host value: copy it to the CPU first")
            tensors.append(value.detach().contiguous())
            return ["tensor", len(tensors) - 1]
        case Size() | tuple() | list() if type(value) in (Size, tuple, list):  # a NamedTuple would lose its type
            kind = "size" if isinstance(value, Size) else "tuple" if isinstance(value, tuple) else "list"
            return [kind, *(_to_json(item, tensors) for item in value)]
        case dict() if all(isinstance(key, str) for key in value):
            return {key: _to_json(item, tensors) for key, item in value.items()}
    raise TypeError(f"{type(value).__name__} cannot be sent to another rank as JSON and tensors")


def _from_json(body: Any, tensors: list[Tensor]) -> Any:
    if isinstance(body, dict):
        return {key: _from_json(item, tensors) for key, item in body.items()}
    if not isinstance(body, list):
        return body
    kind, *items = body
    if kind == "tensor":
        return tensors[items[0]]
    values = (_from_json(item, tensors) for item in items)
    return Size(values) if kind == "size" else tuple(values) if kind == "tuple" else list(values)
