"""Shares the name of what a process is reading with another process, even while the first one is blocked."""

import mmap
import os

_BYTES = 1024


class CurrentRecord:
    """A name of at most a kilobyte in memory that two processes can share."""

    def __init__(self, descriptor: int | None = None) -> None:
        """Maps the memory.

        Args:
            descriptor: descriptor of another `CurrentRecord`, which this one takes over; None allocates memory.
        """
        if descriptor is None:
            descriptor = os.memfd_create("beit3_ds reading place")
            os.ftruncate(descriptor, _BYTES)
        self.descriptor = descriptor
        """Descriptor of the memory, which can be sent to another process."""
        self._memory = mmap.mmap(descriptor, _BYTES)

    def note(self, name: str) -> None:
        """Records what is being read now."""
        text = name.encode("utf-8", "replace")[: _BYTES - 2]
        self._memory[: 2 + len(text)] = len(text).to_bytes(2, "little") + text

    def read(self) -> str:
        """Returns the name of the last note; empty before the first one."""
        length = min(int.from_bytes(self._memory[:2], "little"), _BYTES - 2)
        return self._memory[2 : 2 + length].decode("utf-8", "replace")

    def close_descriptor(self) -> None:
        """Closes the descriptor; the memory stays mapped."""
        os.close(self.descriptor)
