"""Millions of strings in two buffers."""

from array import array
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class StoredStrings:
    """Strings that lie in buffers, in memory or mapped: 8 bytes a string beside its text."""

    def __init__(self, text: bytearray | NDArray[np.uint8], ends: "array[int] | NDArray[np.int64]") -> None:
        """Takes their text, one after the other, and where each ends in it."""
        self.text, self.ends = text, ends

    def __len__(self) -> int:
        """Strings."""
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        """One string.

        Raises:
            IndexError: for an index outside [0, len).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"string {index} of {len(self)}")
        start = self.ends[index - 1] if index else 0
        return bytes(self.text[start : self.ends[index]]).decode("utf-8", "surrogatepass")


class CompactStrings(StoredStrings):
    """A list of strings that takes 8 bytes a string beside its text; a list of `str` takes 57 and more.

    Any Python string is kept as it is, file names that are not UTF-8 included. It is only ever appended to.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        """Starts with these strings."""
        self._bytes, self._ends = bytearray(), array("q")
        super().__init__(self._bytes, self._ends)
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        """Adds one string at the end."""
        self._bytes += string.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))
