"""Sends objects with large tensors between processes; received objects survive the sender's death.

Tensors are written to an unnamed file in /dev/shm, and the message carries the file's descriptor. If /dev/shm is full,
tensors are sent through the socket, which is slower.
"""

import mmap
import os
import pickle
import socket
import struct
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

_HEADER = struct.Struct("<QQQ")  # bytes of the pickle, bytes of the buffers after it, number of buffers
_ALIGNMENT = 64
_CHUNK_BYTES = 1 << 20
SHARED_MEMORY = "/dev/shm"
"""Mount point of the shared-memory file system that carries the tensors."""


class _Pickler(pickle.Pickler):
    """Pickles an object, but passes tensor elements as separate buffers."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor:
            return NotImplemented
        flat = value.detach().cpu().contiguous()
        # With at most one element any strides count as contiguous, but a view as bytes needs a stride of 1.
        elements: Any = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy()
        return _rebuild, (pickle.PickleBuffer(elements), value.dtype, tuple(value.shape))


def _rebuild(elements: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(elements, dtype=dtype).view(shape)


def send_item(connection: socket.socket, item: Any) -> None:
    """Sends an object, including its tensors; may block while bytes pass through the socket.

    Args:
        connection: a blocking AF_UNIX socket.
        item: any object that can be pickled.
    """
    buffers: list[pickle.PickleBuffer] = []
    pickled = BytesIO()
    _Pickler(pickled, 5, buffer_callback=buffers.append).dump(item)
    views = [buffer.raw() for buffer in buffers]
    sizes = struct.pack(f"<{len(views)}Q", *map(len, views))
    content = sizes + pickled.getbuffer()
    total = _offsets([len(view) for view in views])[-1]
    descriptor = _write_shared(views) if total else None
    if descriptor is not None:
        try:
            socket.send_fds(connection, [_HEADER.pack(len(content), 0, len(views))], [descriptor])
        finally:
            os.close(descriptor)
        connection.sendall(content)
        return
    connection.sendall(_HEADER.pack(len(content), total, len(views)))
    connection.sendall(content)
    position = 0
    for view, offset in zip(views, _offsets([len(view) for view in views]), strict=False):
        connection.sendall(bytes(offset - position))
        connection.sendall(view)
        position = offset + len(view)
    connection.sendall(bytes(total - position))


class ItemReceiver:
    """Receives objects from `send_item` without blocking, and assembles them from partial messages."""

    def __init__(self, connection: socket.socket) -> None:
        """Stores the socket from which objects are received."""
        self._connection = connection
        self._arrived = bytearray()
        self._descriptors: list[int] = []
        self.inline_bytes = 0
        """How many tensor bytes of the last object went through the socket, because shared memory was full."""

    def receive(self) -> tuple[Any] | None:
        """Reads the available bytes from the socket; does not block.

        Returns:
            A tuple with the next object; None if the object is not complete yet.

        Raises:
            EOFError: if the other process has closed the socket, for example because it died.
        """
        while True:
            missing = self._count_missing()
            if missing <= 0:
                return (self._build(),)
            try:
                flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                # socket.recv_fds ignores these flags
                chunk, extra, _, _ = self._connection.recvmsg(min(missing, _CHUNK_BYTES), socket.CMSG_LEN(4), flags)
            except BlockingIOError:
                return None
            except ConnectionError:
                raise EOFError from None
            self._descriptors += [struct.unpack_from("i", data)[0] for _, _, data in extra]
            if not chunk:
                raise EOFError
            self._arrived += chunk

    def close(self) -> None:
        """Closes the file descriptors of incomplete objects."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def _count_missing(self) -> int:
        if len(self._arrived) < _HEADER.size:
            return _HEADER.size - len(self._arrived)
        num_pickled, num_inline, _ = _HEADER.unpack_from(self._arrived)
        total: int = _HEADER.size + num_pickled + num_inline
        return total - len(self._arrived)

    def _build(self) -> Any:
        num_pickled, num_inline, count = _HEADER.unpack_from(self._arrived)
        message, self._arrived = memoryview(self._arrived), bytearray()
        content = message[_HEADER.size : _HEADER.size + num_pickled]
        sizes = struct.unpack_from(f"<{count}Q", content)
        offsets = _offsets(sizes)
        self.inline_bytes = num_inline
        memory: Any = memoryview(bytearray(message[_HEADER.size + num_pickled :]))  # a copy, which is aligned
        if not num_inline and offsets[-1]:
            descriptor = self._descriptors.pop(0)
            memory = memoryview(mmap.mmap(descriptor, offsets[-1]))  # freed with the last tensor that uses it
            os.close(descriptor)
        buffers = [memory[offset : offset + size] for offset, size in zip(offsets, sizes, strict=False)]
        return pickle.loads(content[8 * count :], buffers=buffers)


def _write_shared(views: Sequence[memoryview]) -> int | None:
    """Writes buffers to a file in shared memory; returns the file's descriptor, or None if writing fails."""
    descriptor = -1
    try:
        descriptor = os.open(SHARED_MEMORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        offsets = _offsets([len(view) for view in views])
        for view, offset in zip(views, offsets, strict=False):
            while view:
                written = os.pwrite(descriptor, view, offset)
                view, offset = view[written:], offset + written
        if os.fstat(descriptor).st_size < offsets[-1]:
            os.pwrite(descriptor, bytes(1), offsets[-1] - 1)  # fills the last page, so that all of it can be mapped
    except OSError:
        if descriptor >= 0:
            os.close(descriptor)
        return None
    return descriptor


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Returns the aligned offset of each buffer, followed by the aligned end of the last buffer."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return offsets
