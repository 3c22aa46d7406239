"""Detects a file's type from the file's first bytes, and lists the file name extensions of images."""

from beit3_ds.data.files.gaps import check_has_no_gap
from beit3_ds.data.files.reading import open_for_reading

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
"""Extensions of supported images, in lower case. The decoder detects the format from the content, not from the
extension."""
UNREAD_IMAGE_EXTENSIONS = (
    *("avif", "heic", "heif", "jp2", "j2k", "jxl", "jfif", "svg", "ico", "psd", "tga", "ppm", "pgm", "pbm", "exr"),
    *("hdr", "dng", "cr2", "nef", "arw", "raw", "eps"),
)
"""Extensions of unsupported image formats, in lower case."""

_MAGIC = (
    (0, b"\x1f\x8b", "gzip data"),
    (0, b"\x28\xb5\x2f\xfd", "Zstandard data"),
    (4, b"1AY&SY", "bzip2 data"),
    (0, b"\xfd7zXZ\0", "xz data"),
    (0, b"\x04\x22\x4d\x18", "LZ4 data"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a rar archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"PAR1", "a Parquet table"),
    (0, b"ARROW1", "an Arrow table"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"\x89HDF\r\n", "HDF5 data"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"\x89PNG\r\n", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GIF8", "a GIF image"),
    (0, b"\xff\xfe\0\0", "UTF-32 text"),
    (0, b"\0\0\xfe\xff", "UTF-32 text"),
    (0, b"\xff\xfe", "UTF-16 text"),
    (0, b"\xfe\xff", "UTF-16 text"),
)
_HEAD_BYTES = 512


def kind_of_file(path: str) -> str:
    """Detects the type of a file, such as `gzip data`, from its first bytes.

    Returns an empty string if the type is unknown.

    Raises:
        OSError: if the file cannot be opened.
        StorageError: if the file system fails.
    """
    with open_for_reading(path) as file:
        return kind_of_bytes(file.read(_HEAD_BYTES))


def kind_of_bytes(head: bytes) -> str:
    """Detects the type of a file, such as `gzip data`, from its first 512 bytes.

    Returns an empty string if the type is unknown.
    """
    for offset, magic, kind in _MAGIC:
        if head.startswith(magic, offset):
            return kind
    return ""


def check_is_text(path: str) -> None:
    """Checks that a file is plain text, and not a compressed file, an archive, a table, an image or UTF-16.

    Raises:
        ValueError: if the first bytes show one of the other types, or a long part of the file was never written
            (`files.gaps`). The message names the type and advises a conversion.
        OSError: if the file cannot be read.
    """
    check_has_no_gap(path)
    if kind := kind_of_file(path):
        advice = "convert it to UTF-8 with iconv" if "UTF" in kind else "unpack it first"
        raise ValueError(f"it holds {kind}: {advice}")
