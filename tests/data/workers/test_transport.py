"""Tests that tensors with any strides arrive unchanged from a worker."""

import socket

import pytest
import torch
from torch import Tensor

from beit3_ds.data.workers.transport import ItemReceiver, send_item

TENSORS = {
    # As what a batch holds of a stream without samples.
    "empty, stride 0": torch.empty(0, dtype=torch.int64).as_strided((0,), (0,)),
    "empty slice": torch.arange(6)[::3][:0],
    "empty, of another shape": torch.zeros(3, 0, 2),
    "one element, stride 0": torch.tensor(5).expand(1),
    "one element of a column": torch.arange(6).view(2, 3)[:1, 1],
    "scalar": torch.tensor(1.5, dtype=torch.float64),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
    "bool": torch.tensor([True, False]),
    "bf16": torch.tensor([1.0, -2.0]).bfloat16(),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_all_strides_arrive(name: str) -> None:
    """Catches a worker that dies on a stream without samples, because empty tensors have no view as bytes."""
    tensor = TENSORS[name]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_item(ours, {"item": tensor})
        arrived = ItemReceiver(theirs).receive()
    assert arrived is not None
    received: Tensor = arrived[0]["item"]
    assert (received.dtype, received.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(received, tensor)
