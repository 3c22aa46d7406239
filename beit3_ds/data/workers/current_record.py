"""Shares the name of the record that a process is reading, so that another process can report a blocked read."""

import mmap
import os

_BYTES = 1024


class CurrentRecord:
    """Holds the name of the record that is being read, in memory that two processes share.

    A name longer than 1022 bytes is truncated.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        """Allocates shared memory, or opens the shared memory of another `CurrentRecord`.

        Args:
            descriptor: file descriptor of another instance's memory; None allocates new memory.
        """
        if descriptor is None:
            descriptor = os.memfd_create("beit3_ds current record")
            os.ftruncate(descriptor, _BYTES)
        self.descriptor = descriptor
        """File descriptor for the shared memory. The descriptor can be sent to another process."""
        self._memory = mmap.mmap(descriptor, _BYTES)

    def set(self, name: str) -> None:
        """Stores the name of the current record; truncates a name that is too long."""
        text = name.encode("utf-8", "replace")[: _BYTES - 2]
        self._memory[: 2 + len(text)] = len(text).to_bytes(2, "little") + text

    def get(self) -> str:
        """Returns the last stored name, or an empty string if no name was stored."""
        length = min(int.from_bytes(self._memory[:2], "little"), _BYTES - 2)
        return self._memory[2 : 2 + length].decode("utf-8", "replace")

    def close_descriptor(self) -> None:
        """Closes the descriptor; the memory stays mapped."""
        os.close(self.descriptor)
