"""Moves micro-batches to the device, each while the device computes the one before."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from beit3_ds.batch import PackedBatch


class DeviceMoves:
    """Moves announced micro-batches to the device on a stream of their own, one micro-batch ahead.

    So the device holds the tensors of at most one micro-batch that it does not compute yet. Without such a stream, on a
    CPU, a micro-batch is moved when it is taken.
    """

    def __init__(self, device: torch.device, side: Any = None, current: Callable[[], Any] = lambda: None) -> None:
        """Stores the arguments.

        Args:
            device: device of the model.
            side: stream for the moves, such as a `torch.cuda.Stream`; None moves nothing ahead.
            current: returns the stream on which the model computes.
        """
        self._device, self._side, self._current = device, side, current
        self._announced: deque[PackedBatch] = deque()
        self._ahead: tuple[PackedBatch, PackedBatch] | None = None

    def announce(self, batches: Iterable[PackedBatch]) -> None:
        """Names the micro-batches that will be taken next, in this order, and starts to move the first of them."""
        self._announced = deque(batches)
        self._start_next()

    def take(self, batch: PackedBatch) -> PackedBatch:
        """Returns a micro-batch on the device, and starts to move the next one if `batch` was moved ahead.

        The host does not wait. The device computes nothing of the batch before its tensors have arrived.
        """
        if self._ahead is None or self._ahead[0] is not batch:
            return batch.to(self._device)
        (_, moved), self._ahead = self._ahead, None
        stream = self._current()
        stream.wait_stream(self._side)
        for tensor in moved.tensors():
            tensor.record_stream(stream)  # the allocator knows only the stream on which it was allocated
        self._start_next()
        return moved

    def _start_next(self) -> None:
        self._ahead = None
        if self._side is not None and self._announced:
            batch = self._announced.popleft()
            with self._side:
                self._ahead = batch, batch.to(self._device)


def build_device_moves(device: torch.device) -> DeviceMoves:
    """Builds the moves to a device; only CUDA devices get a stream for them."""
    if device.type != "cuda":
        return DeviceMoves(device)
    return DeviceMoves(device, torch.cuda.Stream(device), lambda: torch.cuda.current_stream(device))
