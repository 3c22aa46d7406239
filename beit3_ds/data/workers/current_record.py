"""Shows other processes the name of the record that a process is reading, even while that process is blocked."""

import mmap
import os

_BYTES = 1024


class CurrentRecord:
    """Holds a name of at most a kilobyte, in memory that two processes share."""

    def __init__(self, descriptor: int | None = None) -> None:
        """Maps the memory.

        Args:
            descriptor: descriptor of another `CurrentRecord`, to share its memory; None allocates memory.
        """
        if descriptor is None:
            descriptor = os.memfd_create("beit3_ds current record")
            os.ftruncate(descriptor, _BYTES)
        self.descriptor = descriptor
        """Descriptor of the memory, which can be sent to another process."""
        self._memory = mmap.mmap(descriptor, _BYTES)

    def set(self, name: str) -> None:
        """Stores the name of the record that is read now, cut to the size of the memory."""
        text = name.encode("utf-8", "replace")[: _BYTES - 2]
        self._memory[: 2 + len(text)] = len(text).to_bytes(2, "little") + text

    def get(self) -> str:
        """Returns the name that was stored last; empty before the first one."""
        length = min(int.from_bytes(self._memory[:2], "little"), _BYTES - 2)
        return self._memory[2 : 2 + length].decode("utf-8", "replace")

    def close_descriptor(self) -> None:
        """Closes the descriptor; the memory stays mapped."""
        os.close(self.descriptor)
