"""Opens and decompresses text files (gzip, Zstandard); refuses files that expand too much (decompression bombs)."""

import gzip
import io
import os
import zlib
from typing import Any, Literal, cast

from beit3_ds.data.files.reading import open_for_reading

Compression = Literal["", "gzip", "zstandard"]
"""Compression of a file; empty if the file is not compressed."""
DECOMPRESSION_ERRORS = (OSError, EOFError, zlib.error)
"""Exceptions raised when a file is missing or a compressed file is damaged."""

_COMPRESSED_BYTES = 512  # read per call of zstandard; one byte may expand to 32768 bytes
_CHUNK_BYTES = 1 << 20
_MOST_EXPANSION = 100  # texts expand about tenfold
_FREE_BYTES = 1 << 26


def open_decompressed(path: str, compression: Compression) -> io.BufferedReader:
    """Opens a file for reading and decompresses its content; retries failed reads.

    For a compressed file, a read raises EOFError if the file is truncated. It raises OSError if the content exceeds
    both 64 MiB and 100 times the file's size.
    """
    match compression:
        case "gzip":
            content: io.RawIOBase = cast(io.RawIOBase, gzip.GzipFile(fileobj=open_for_reading(path)))
        case "zstandard":
            content = _ZstandardFrames(path)
        case _:
            return open_for_reading(path)
    return io.BufferedReader(_Expansion(content, os.path.getsize(path)), _CHUNK_BYTES)


class _Expansion(io.RawIOBase):
    """Reads decompressed content up to a limit; treats more content as a decompression bomb."""

    def __init__(self, content: io.RawIOBase, compressed_bytes: int) -> None:
        self._content, self._num_read = content, 0
        self._limit = max(_FREE_BYTES, _MOST_EXPANSION * compressed_bytes)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._content.readinto(buffer) or 0
        self._num_read += count
        if self._num_read > self._limit:
            raise OSError(f"it expands more than {_MOST_EXPANSION}-fold, which no text does")
        return count

    def close(self) -> None:
        self._content.close()
        super().close()


class _ZstandardFrames(io.RawIOBase):
    """Reads all frames of a .zst file; raises EOFError for a truncated frame, unlike the zstandard package's reader."""

    def __init__(self, path: str) -> None:
        self._file = open_for_reading(path)
        self._frame = _start_frame()
        self._inside = False
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            self._compressed = self._compressed or self._file.read(_COMPRESSED_BYTES)
            if not self._compressed:
                if self._inside:
                    raise EOFError("it ends within a Zstandard frame")
                return 0
            self._ready = memoryview(_decompress(self._frame, self._compressed))
            self._inside, self._compressed = not self._frame.eof, self._frame.unused_data
            if self._frame.eof:
                self._frame = _start_frame()
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _start_frame() -> Any:
    import zstandard  # only .zst files need the package

    return zstandard.ZstdDecompressor().decompressobj()


def _decompress(frame: Any, compressed: bytes) -> bytes:
    import zstandard

    try:
        content: bytes = frame.decompress(compressed)
    except zstandard.ZstdError as error:
        raise OSError(f"a Zstandard frame is damaged: {error}") from error
    return content
