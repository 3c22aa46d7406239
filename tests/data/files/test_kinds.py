"""Tests that kinds of files are recognised by content and not by name."""

import bz2
import gzip
import io
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from beit3_ds.data.files.kinds import IMAGE_EXTENSIONS, UNREAD_IMAGE_EXTENSIONS, kind_of_bytes, kind_of_file


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a"))
    return buffer.getvalue()


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (gzip.compress(b"a", mtime=0), "gzip data"),
        (zstandard.compress(b"a"), "Zstandard data"),
        (bz2.compress(b"a"), "bzip2 data"),
        (lzma.compress(b"a"), "xz data"),
        (_tar(), "a tar archive"),  # catches a mark that is looked for at the beginning only
        (b"PK\x03\x04" + bytes(99), "a zip archive"),
        (_npy(), "a NumPy array"),
        ("text".encode("utf-16"), "UTF-16 text"),
        ("text".encode("utf-32"), "UTF-32 text"),  # catches UTF-32 taken for UTF-16, whose mark begins the same way
        (b"BZh is a name", ""),
        (b"plain text", ""),
        (b"", ""),
    ],
)
def test_content_decides(tmp_path: Path, data: bytes, kind: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    assert kind_of_file(str(path)) == kind_of_bytes(data) == kind


def test_images_of_real_files(png: bytes) -> None:
    assert kind_of_bytes(png) == "a PNG image"
    assert not set(IMAGE_EXTENSIONS) & set(UNREAD_IMAGE_EXTENSIONS)
