"""Tests random damage to tars, index files, images and captions: no crash, no hang, no sample mistaken for another.

For bytes that a tar may have lost or swapped, this means:

* Without an index, a sample with undamaged header and data has its own bytes or is missing. It may have another's bytes
  only if `skipped` reports a second member with its name.
* With an index, a tar of another size is refused when it is opened. An undamaged sample has its own bytes. `--verify`
  passes only if every sample has its own bytes.
* A damaged image raises `ValueError` or has pixels within the limits. JPEG has no checksums, so only `--verify` can
  find changed pixels.
"""

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from beit3_ds.config import ConfigError
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.images.annotated import AnnotatedImages
from beit3_ds.data.images.annotations import (
    read_coco_captions,
    read_conceptual_captions,
    read_sbu_captions,
    read_visual_genome,
)
from beit3_ds.data.images.captions import decode_caption, decode_json_caption
from beit3_ds.data.images.decoding import MAX_PIXELS, decode_image
from beit3_ds.data.images.shard_index import ShardIndex, StoredIndex, index_path
from beit3_ds.data.images.shard_scan import scan_shard
from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.prepare.index import prepare_indices
from tests.data.damage import GENERAL_DAMAGE, TAR_DAMAGE, fast_and_slow, time_limit

# Tars.


class Tar(NamedTuple):
    path: Path
    data: bytes
    index: ShardIndex
    cache_dir: str


FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


@pytest.fixture
def tars(tmp_path: Path) -> list[Tar]:
    """Writes one small tar of each format, with its index."""
    tars, rng = [], np.random.default_rng(0)
    for tar_format in FORMATS:
        path = tmp_path / f"{tar_format}.tar"
        with tarfile.open(path, "w", format=tar_format) as archive:
            for i in range(4):
                # Every second sample in long folders: with extended headers, if the format has them.
                folder = f"{'very-' * 8}long/{'folders-' * 8}" if i % 2 else "short"
                for extension, size in (("jpg", 700), ("txt", 30), ("json", 500)):
                    info = tarfile.TarInfo(f"{folder}/{i}.{extension}")
                    info.size = size + i
                    archive.addfile(info, io.BytesIO(rng.bytes(info.size)))
        # The padding behind the end block would take most of the damage.
        data = path.read_bytes().rstrip(b"\0")
        data += bytes(-len(data) % 512 + 1024)
        path.write_bytes(data)
        prepare_indices([str(path)], str(tmp_path), num_processes=1)
        tars.append(Tar(path, data, scan_shard(str(path), with_checksums=True), str(tmp_path)))
    return tars


Members = dict[tuple[bytes, str], tuple[int, int]]


def members(index: ShardIndex) -> Members:
    """Returns offset and size in bytes of each member, by key and kind.

    A caption from JSON has another kind than one from a text file, because it may replace a lost one.
    """
    return {
        (record["key"], kind + str(record["caption_is_json"]) * (kind == "caption")): (
            int(record[kind]["offset"]),
            int(record[kind]["size"]),
        )
        for record in index.records
        for kind in ("image", "caption")
        if record[kind]["size"] >= 0
    }


def changed_positions(old: bytes, new: bytes) -> np.ndarray:
    length = min(len(old), len(new))
    differ = np.frombuffer(old[:length], np.uint8) != np.frombuffer(new[:length], np.uint8)
    return np.concatenate([np.flatnonzero(differ), np.arange(length, len(old))])


def is_touched(changed: np.ndarray, offset: int, size: int) -> bool:
    """Returns whether damage hit a member's data or headers; a long name needs two more header blocks."""
    return bool(((changed >= offset - 4 * 512) & (changed < offset + size)).any())


def check_scan(tar: Tar, data: bytes) -> None:
    """Checks the samples of a damaged tar that has no index."""
    try:
        index = scan_shard(str(tar.path), with_checksums=True)
    except ConfigError:
        return
    doubled = "name twice" in index.skipped or "second image of a sample" in index.skipped
    changed, original = changed_positions(tar.data, data), members(tar.index)
    for name, (offset, size) in members(index).items():
        assert offset + size <= len(data)
        if name in original and not doubled and not is_touched(changed, *original[name]):
            start, length = original[name]
            assert data[offset : offset + size] == tar.data[start : start + length], name


def check_indexed(tar: Tar, data: bytes) -> None:
    """Checks the samples of a damaged tar that has the index of the undamaged one."""
    if len(data) != len(tar.data):
        with pytest.raises(ConfigError, match="has size"):
            TarShards([str(tar.path)], tar.cache_dir)
        return
    shards = TarShards([str(tar.path)], tar.cache_dir)
    for i in range(len(shards)):
        for read in (shards.image, shards.caption):
            with contextlib.suppress(BrokenRecordError):
                read(i)
    own = all(data[o : o + s] == tar.data[o : o + s] for o, s in members(tar.index).values())
    try:
        prepare_indices([str(tar.path)], tar.cache_dir, verify=True, num_processes=1)
    except ConfigError:
        assert data != tar.data  # damage to members that are no samples is a reason, too
    else:
        assert own


@fast_and_slow
def test_damaged_tars(tars: list[Tar], cases: range) -> None:
    refused = 0
    for case in cases:
        rng = np.random.default_rng(case)
        tar = tars[case % len(tars)]
        data = tar.data
        for _ in range(rng.integers(1, 3)):
            data = TAR_DAMAGE[rng.integers(len(TAR_DAMAGE))](data or b"\0", rng)
        status = os.stat(tar.path)
        tar.path.write_bytes(data)
        os.utime(tar.path, ns=(status.st_atime_ns, tar.index.tar_mtime_ns))
        with time_limit():
            check_scan(tar, data)
            check_indexed(tar, data)
        try:
            scan_shard(str(tar.path))
        except ConfigError:
            refused += 1
        tar.path.write_bytes(tar.data)
    # catches damage that never passes the headers, or never fails there: then half of the cases would test nothing
    assert 0.2 < refused / len(cases) < 0.95


@fast_and_slow
def test_damaged_index_files(tars: list[Tar], cases: range) -> None:
    opened = 0
    for case in cases:
        rng, tar = np.random.default_rng(case), tars[case % len(tars)]
        path = Path(index_path(tar.cache_dir, str(tar.path)))
        whole = path.read_bytes()
        path.write_bytes(GENERAL_DAMAGE[rng.integers(len(GENERAL_DAMAGE))](whole, rng))
        with time_limit(), contextlib.suppress(ConfigError):
            shards = TarShards([str(tar.path)], tar.cache_dir)
            opened += 1
            for i in range(len(shards)):
                for read in (shards.image, shards.caption):
                    with contextlib.suppress(BrokenRecordError):
                        read(i)
            stored = StoredIndex(str(path), str(tar.path))
            assert stored.load().tolist() == tar.index.records.tolist()  # or its checksum is a ConfigError
        path.write_bytes(whole)
    assert 0 < opened < len(cases)


# Images.


def _encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def image_files() -> dict[str, bytes]:
    """Encodes a small picture in every format and mode that occurs in corpora."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 7, 4), dtype=np.uint8)).resize((47, 40), Image.Resampling.BICUBIC)
    rgb, grey16 = smooth.convert("RGB"), Image.fromarray(rng.integers(0, 65536, (40, 47), dtype=np.uint16))
    frames = [rgb.rotate(angle) for angle in (90, 180)]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    return {
        "jpeg": _encode(rgb, "jpeg", exif=exif),
        "progressive jpeg": _encode(rgb, "jpeg", progressive=True),
        "grey jpeg": _encode(rgb.convert("L"), "jpeg"),
        "cmyk jpeg": _encode(rgb.convert("CMYK"), "jpeg"),
        "png": _encode(rgb, "png", exif=exif),
        "rgba png": _encode(smooth, "png"),
        "palette png": _encode(rgb.quantize(16), "png", transparency=3),
        "16-bit png": _encode(grey16, "png"),
        "bilevel png": _encode(rgb.convert("1"), "png"),
        "animated png": _encode(rgb, "png", save_all=True, append_images=frames),
        "webp": _encode(smooth, "webp", exif=exif),
        "lossless webp": _encode(rgb, "webp", lossless=True),
        "animated webp": _encode(rgb, "webp", save_all=True, append_images=frames),
        "gif": _encode(rgb, "gif", save_all=True, append_images=frames),
        "bmp": _encode(rgb, "bmp"),
        "tiff": _encode(rgb, "tiff"),
        "lzw tiff": _encode(smooth, "tiff", compression="tiff_lzw"),
        "jpeg tiff": _encode(rgb, "tiff", compression="jpeg"),
        "16-bit tiff": _encode(grey16, "tiff", compression="tiff_deflate"),
    }


@pytest.mark.parametrize("name", image_files())
def test_sound_images_are_read(name: str) -> None:
    image = decode_image(image_files()[name])
    turned = name in ("jpeg", "png", "webp")
    assert (image.mode, image.size) == ("RGB", (40, 47) if turned else (47, 40))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@fast_and_slow
def test_damaged_images(cases: range) -> None:
    files = list(image_files().values())
    decoded = 0
    for case in cases:
        rng = np.random.default_rng(case)
        data = files[case % len(files)]
        for _ in range(rng.integers(1, 3)):
            data = GENERAL_DAMAGE[rng.integers(len(GENERAL_DAMAGE))](data or b"\0", rng)
        if rng.random() < 0.2:  # the head of one file and the tail of another
            other = files[rng.integers(len(files))]
            data = data[: rng.integers(1, 1 + max(1, len(data)))] + other[rng.integers(len(other)) :]
        with time_limit():
            try:
                image = decode_image(data)
            except ValueError:
                continue
        decoded += 1
        assert image.mode == "RGB"
        assert 0 < image.width * image.height <= MAX_PIXELS
        assert len(image.tobytes()) == 3 * image.width * image.height
    assert 0.1 < decoded / len(cases) < 0.9


# Captions.


@fast_and_slow
def test_damaged_captions(cases: range) -> None:
    texts: dict[Callable[[bytes], str], bytes] = {
        decode_caption: "\ufeffein Vogel \U0001f426 im Schnee, 雪の鳥".encode() * 3,
        decode_json_caption: b'{"caption": "a \\ud83d\\udc26 in \\u96ea", "width": 3e2, "exif": "{\\"a\\": []}"}',
    }
    for case in cases:
        for decode, text in texts.items():
            rng = np.random.default_rng(case)
            data = GENERAL_DAMAGE[rng.integers(len(GENERAL_DAMAGE))](text, rng)
            with time_limit(), contextlib.suppress(ValueError):
                caption = decode(data)
                assert caption
                assert caption == caption.strip()
                assert "\0" not in caption
                caption.encode("utf-8")  # half a surrogate pair would raise in the tokenizer


# Annotations.


@fast_and_slow
def test_damaged_annotations(tmp_path: Path, cases: range) -> None:
    folder, path = tmp_path / "images", tmp_path / "annotations"
    folder.mkdir()
    (folder / "1.png").write_bytes(_encode(Image.new("RGB", (9, 9)), "png"))
    coco = {"images": [{"id": 7, "file_name": "1.png"}], "annotations": [{"image_id": 7, "caption": "a bird"}] * 2}
    regions = [{"id": 7, "regions": [{"phrase": "a \ud83d\udc26"}, {"phrase": "snow"}]}, {"id": 8, "regions": []}]
    images = json.dumps([{"image_id": 7, "url": "http://a.org/../1.png"}]).encode()
    (tmp_path / "images.json").write_bytes(images)
    readers: list[tuple[bytes, Callable[[], AnnotatedImages]]] = [
        (json.dumps(coco).encode(), lambda: read_coco_captions(str(path), str(folder))),
        (
            json.dumps(regions).encode(),
            lambda: read_visual_genome(str(path), str(tmp_path / "images.json"), str(folder)),
        ),
        (b"zero\none caption\n", lambda: read_sbu_captions(str(path), str(folder))),
        (
            b"zero\thttp://z.org\none\thttp://o.org\n",
            lambda: read_conceptual_captions(str(path), str(folder), "caption_url"),
        ),
    ]
    read = 0
    for case in cases:
        rng = np.random.default_rng(case)
        whole, reader = readers[case % len(readers)]
        path.write_bytes(GENERAL_DAMAGE[rng.integers(len(GENERAL_DAMAGE))](whole, rng))
        with time_limit(), contextlib.suppress(ConfigError):
            source = reader()
            for i in range(len(source)):
                for get in (source.image, source.caption, source.name):
                    with contextlib.suppress(BrokenRecordError):
                        get(i)
            read += 1
    assert 0 < read < len(cases)
