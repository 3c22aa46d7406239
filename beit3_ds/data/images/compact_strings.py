"""Stores millions of strings compactly, in two buffers."""

from array import array
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class StoredStrings:
    """Reads strings from a buffer of joined texts and a buffer of end offsets, in memory or memory-mapped.

    Each string takes 8 bytes in addition to its text.
    """

    def __init__(self, text: bytearray | NDArray[np.uint8], ends: "array[int] | NDArray[np.int64]") -> None:
        """Stores the buffers.

        Args:
            text: joined UTF-8 bytes of all strings.
            ends: end offset of each string in `text`, in bytes.
        """
        self.text, self.ends = text, ends

    def __len__(self) -> int:
        """Returns the number of strings."""
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        """Returns one string; bytes that are not UTF-8, as in a damaged file, become escapes.

        Raises:
            IndexError: if the index is outside [0, len).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"string {index} of {len(self)}")
        start = self.ends[index - 1] if index else 0
        text = bytes(self.text[start : self.ends[index]])
        try:
            return text.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return text.decode("utf-8", "surrogateescape")


class CompactStrings(StoredStrings):
    """Stores strings with an overhead of 8 bytes per string. A list of `str` has at least 57 bytes of overhead per
    string.

    Accepts any Python string, even the name of a file whose bytes are not UTF-8. Strings can only be appended.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        """Creates the collection with the given strings."""
        self._bytes, self._ends = bytearray(), array("q")
        super().__init__(self._bytes, self._ends)
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        """Appends one string."""
        self._bytes += string.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))
