"""Copies each micro-batch to the device while the device computes the previous micro-batch."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from beit3_ds.batch import PackedBatch


class DeviceMoves:
    """Copies micro-batches to the device on a separate CUDA stream, one micro-batch ahead of their use.

    `announce` sets the order of the micro-batches. Besides the micro-batch in use, the device holds at most one
    micro-batch. On a CPU, nothing is copied ahead: `take` moves each micro-batch.
    """

    def __init__(self, device: torch.device, side: Any = None, current: Callable[[], Any] = lambda: None) -> None:
        """Stores the arguments.

        Args:
            device: device of the model.
            side: stream for copies, such as a `torch.cuda.Stream`. The next micro-batch is copied on this stream while
                the model computes. With None, a micro-batch is copied only when `take` returns it.
            current: function that returns the stream on which the model computes.
        """
        self._device, self._side, self._current = device, side, current
        self._announced: deque[PackedBatch] = deque()
        self._ahead: tuple[PackedBatch, PackedBatch] | None = None

    def announce(self, batches: Iterable[PackedBatch]) -> None:
        """Sets the list of micro-batches that will be passed to `take` in this order. Starts copying the first
        micro-batch.
        """
        self._announced = deque(batches)
        self._start_next()

    def take(self, batch: PackedBatch) -> PackedBatch:
        """Returns the micro-batch `batch` on the device, and starts copying the next micro-batch.

        The order is that of the list passed to `announce`. If `batch` was not copied ahead, only `batch` is copied, and
        the copy of the next micro-batch does not start. The host never waits for a copy; the device waits for the copy
        before using the micro-batch.
        """
        if self._ahead is None or self._ahead[0] is not batch:
            return batch.to(self._device)
        (_, moved), self._ahead = self._ahead, None
        stream = self._current()
        stream.wait_stream(self._side)
        for tensor in moved.tensors():
            tensor.record_stream(stream)  # the allocator knows only the CUDA stream on which the tensor was allocated
        self._start_next()
        return moved

    def _start_next(self) -> None:
        self._ahead = None
        if self._side is not None and self._announced:
            batch = self._announced.popleft()
            with self._side:
                self._ahead = batch, batch.to(self._device)


def build_device_moves(device: torch.device) -> DeviceMoves:
    """Builds the `DeviceMoves` of a device, with a separate stream if it is a CUDA device."""
    if device.type != "cuda":
        return DeviceMoves(device)
    return DeviceMoves(device, torch.cuda.Stream(device), lambda: torch.cuda.current_stream(device))
