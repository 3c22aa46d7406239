"""Tests decoding of every pixel format to upright RGB, and clear errors."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from beit3_ds.data.images.decoding import decode_image

SIZE = (8, 8)


def _encode(image: Image.Image, file_format: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _color(image: Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    pixels = np.asarray(image).reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    return tuple(pixels[0].tolist())


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", SIZE, (1, 2, 3)), (1, 2, 3)),
        (Image.new("L", SIZE, 7), (7, 7, 7)),
        (Image.new("1", SIZE, 1), (255, 255, 255)),
        # catches convert("RGB") alone, which shows the hidden color below transparent pixels
        (Image.new("RGBA", SIZE, (10, 20, 30, 0)), (255, 255, 255)),
        (Image.new("RGBA", SIZE, (0, 0, 0, 128)), (127, 127, 127)),
        (Image.new("LA", SIZE, (0, 0)), (255, 255, 255)),
        # catches Pillow's conversion of 16 bits, which clips at 255 instead of scaling
        (Image.fromarray(np.full(SIZE, 0x8000, dtype=np.uint16)), (127, 127, 127)),
    ],
)
def test_modes_become_rgb_on_white(image: Image.Image, expected: tuple[int, ...]) -> None:
    assert _color(decode_image(_encode(image))) == expected


def test_transparent_palette_becomes_white() -> None:
    image = Image.new("P", SIZE, 0)
    image.putpalette([200, 0, 0, 0, 200, 0])
    assert _color(decode_image(_encode(image, transparency=0))) == (255, 255, 255)
    assert _color(decode_image(_encode(image))) == (200, 0, 0)


def test_cmyk_jpeg_becomes_rgb() -> None:
    red, green, blue = _color(decode_image(_encode(Image.new("CMYK", SIZE, (0, 255, 255, 0)), "jpeg")))
    assert red > 200 > 60 > max(green, blue)


def test_large_jpegs_are_decoded_no_larger_than_needed() -> None:
    gradient = np.linspace(0, 255, 1600, dtype=np.uint8)[None, :, None].repeat(1200, 0).repeat(3, 2)
    jpeg = _encode(Image.fromarray(gradient), "jpeg", quality=95)
    whole = decode_image(jpeg)
    assert whole.size == (1600, 1200)
    assert decode_image(jpeg, 300).size == (400, 300)
    assert decode_image(jpeg, 301).size == (800, 600)  # catches an image smaller than what was asked for
    assert decode_image(jpeg, 2000).size == (1600, 1200)
    assert decode_image(_encode(Image.fromarray(gradient)), 300).size == (1600, 1200)  # only JPEG can
    difference = np.asarray(decode_image(jpeg, 300), np.int16) - np.asarray(whole.reduce(4), np.int16)
    assert np.abs(difference).max() <= 3


def test_exif_turns_the_image_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    image = decode_image(_encode(Image.new("RGB", (30, 10)), "jpeg", exif=exif))
    assert image.size == (10, 30)


def test_broken_bytes_are_a_value_error(png: bytes) -> None:
    for data in (b"", b"no image", png[: len(png) // 2]):
        with pytest.raises(ValueError, match=r"Error: |^empty file|^cannot identify the image"):
            decode_image(data)


def _png_of_claimed_size(width: int, height: int) -> bytes:
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": b""}
    coded = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(coded)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 50_000])  # of the first, Pillow only warns
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    with pytest.raises(ValueError, match="pixels"):
        decode_image(_png_of_claimed_size(side, side))


def test_unknown_white_is_refused() -> None:
    with pytest.raises(ValueError, match="mode F"):
        decode_image(_encode(Image.new("F", SIZE, 0.5), "tiff"))


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", SIZE, color) for color in ("red", "blue")]
    for file_format in ("gif", "png", "webp"):
        red, _, blue = _color(decode_image(_encode(frames[0], file_format, save_all=True, append_images=frames[1:])))
        assert red > 200 > 60 > blue


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_does(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    for file_format in ("png", "tiff"):  # of TIFF, Pillow itself turns the pixels: twice would be wrong
        data = _encode(picture, file_format, exif=exif)
        with Image.open(io.BytesIO(data)) as opened:
            expected = ImageOps.exif_transpose(opened).convert("RGB")
        np.testing.assert_array_equal(decode_image(data), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"II*\0\xff\xff\xff\xff", b"no TIFF at all"])  # warned of, and raised for
def test_unreadable_exif_does_not_cost_the_image(exif: bytes) -> None:
    assert decode_image(_encode(Image.new("RGB", SIZE, "red"), "png", exif=b"Exif\0\0" + exif)).size == SIZE


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    data = _encode(Image.new("RGB", SIZE), "jpeg", progressive=True)
    scan = data.index(b"\xff\xda")
    with pytest.raises(ValueError, match="scans"):  # a small file of thousands of scans of many pixels takes hours
        decode_image(data[:scan] + data[scan:-2] * 200 + data[-2:])


@pytest.mark.parametrize("file_format", ["eps", "ppm", "ico"])
def test_formats_outside_the_list_are_refused(file_format: str) -> None:
    # catches Pillow's default, which starts Ghostscript for an EPS under the name of a JPEG
    with pytest.raises(ValueError, match="cannot identify the image: none of JPEG"):
        decode_image(_encode(Image.new("RGB", (16, 16)), file_format))


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [("webp", "RGB", {"method": 0}), ("png", "RGBA", {"compress_level": 1}), ("jpeg", "RGB", {"progressive": True})],
)
def test_an_image_that_takes_too_much_memory_is_refused_before_it_is_decoded(
    kind: str, mode: str, options: dict[str, Any]
) -> None:
    """Catches a limit on the number of pixels alone; formats and modes need 4 to 24 bytes per pixel."""
    Image.new(mode, (6000, 6000), "red").save(file := io.BytesIO(), kind, **options)
    with pytest.raises(ValueError, match=r"decoding 6000 x 6000 pixels of mode RGBA? takes \d+ bytes, more than"):
        decode_image(file.getvalue())
