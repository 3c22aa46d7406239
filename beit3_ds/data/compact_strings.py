"""Millions of strings in two buffers."""

from array import array
from collections.abc import Iterable


class CompactStrings:
    """A list of strings that takes 8 bytes a string beside its text; a list of `str` takes 57 and more.

    Any Python string is kept as it is, file names that are not UTF-8 included. It is only ever appended to.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        """Starts with these strings."""
        self._bytes, self._ends = bytearray(), array("q")
        for string in strings:
            self.append(string)

    def __len__(self) -> int:
        """Strings."""
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        """One string.

        Raises:
            IndexError: for an index outside [0, len).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"string {index} of {len(self)}")
        start = self._ends[index - 1] if index else 0
        return self._bytes[start : self._ends[index]].decode("utf-8", "surrogatepass")

    def append(self, string: str) -> None:
        """Adds one string at the end."""
        self._bytes += string.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))
