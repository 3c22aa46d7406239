"""Reads images and captions from WebDataset tar shards in any order, without unpacking the shards."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from beit3_ds.config import ConfigError
from beit3_ds.data.files.descriptors import FileChangedError, OpenFiles
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.kinds import IMAGE_EXTENSIONS
from beit3_ds.data.files.patterns import expand_patterns
from beit3_ds.data.files.reading import read_with_retries
from beit3_ds.data.files.records import BrokenRecordError, Skipped
from beit3_ds.data.images.captions import MAX_JSON_BYTES, decode_caption, decode_json_caption
from beit3_ds.data.images.decoding import MAX_IMAGE_BYTES, decode_image
from beit3_ds.data.images.shard_index import NO_MEMBER, ShardIndex, StoredIndex, index_path
from beit3_ds.data.images.shard_scan import CAPTION_EXTENSIONS, scan_shard
from beit3_ds.printing import printable

_EMPTY = "tar without samples"
_MAX_GAP = 1 << 18  # maximum bytes between a sample's image and caption, so that one read returns both
_OPENING_THREADS = 16
_KINDS = {"image": (IMAGE_EXTENSIONS, MAX_IMAGE_BYTES), "caption": (CAPTION_EXTENSIONS, MAX_JSON_BYTES)}


class TarShards:
    """Reads samples from uncompressed tar files, ordered by file and then by each sample's first member.

    The members `folder/KEY.webp` and `folder/KEY.txt` are the image and the caption of the sample `folder/KEY`. If
    `KEY.txt` is missing, the caption is the value of `caption` in `KEY.json`. A key may contain dots: `v.one.jpg` and
    `v.two.jpg` are two samples. There is one exception: if the tar contains an image or a caption with the key `KEY`,
    then `KEY.seg.png` does not belong to a sample `KEY.seg`. It is an additional member of the sample `KEY`, and is
    skipped. `skipped` counts the skipped members, and also the tars without samples.

    Real corpora contain many irregular files. These rules apply:

    | found | rule |
    |---|---|
    | truncated tar, even if cut between two members; damaged header; second tar appended | `ConfigError` |
    | at the start, tar whose size or modification time differs from its index | `ConfigError` |
    | tar that changes its size or modification time during the run | `BrokenRecordError` |
    | changed bytes with unchanged size and modification time | found by `beit3 prepare index --verify` |
    | repeated name; second image of a sample | the first is read, the others are in `skipped` |
    | additional member; hidden file; other extension; unsupported image format | in `skipped` |
    | tar without samples | in `skipped`; `ConfigError` if no tar has samples |
    | tar or index that disappears, or stays unreadable after retries | `StorageError`, which ends the run |
    | link, device, sparse file, name with `..` or a leading `/` | never read, in `skipped` |
    | image that is empty, truncated or too large; not an image; Pillow mode I or F | `BrokenRecordError` |
    | image with the extension of another format | read by its content |
    | grey, palette, CMYK, 16 bits, alpha, animation, EXIF rotation | upright RGB on white, first frame |
    | caption missing, empty, too long, not UTF-8, with NUL or half a surrogate pair | `BrokenRecordError` |

    A tar without an index file in `cache_dir` is scanned. The index then takes about 50 bytes per sample in each
    process. Index files are memory-mapped and tars stay open (`OpenFiles`). So one read is enough for an image, for a
    caption, or for a pair whose image and caption are neighbours in the tar.
    """

    def __init__(self, patterns: Iterable[str], cache_dir: str | None = None, files: OpenFiles | None = None) -> None:
        """Opens the tars and their indices.

        Args:
            patterns: paths of tars or glob patterns.
            cache_dir: folder of the index files from `beit3 prepare index`; without one, the tars are scanned.
            files: cache of open files; None creates a new cache.

        Raises:
            ConfigError: if a pattern has no match; if a file is unreadable, not a tar, damaged, truncated, or changed
                since the index was written; or if no tar has a sample.
            StorageError: if the file system fails.
        """
        self.paths = expand_patterns(patterns)
        self._files = files or OpenFiles()
        self._indices = _open_indices(self.paths, cache_dir, self._files)
        self._ends = np.cumsum([len(index) for index in self._indices])
        if not len(self):
            raise ConfigError(f"data: {_shorten(self.paths)} holds no samples{_describe_skipped(self.skipped)}.")

    def __len__(self) -> int:
        """Returns the number of samples in all shards, including broken samples."""
        return int(self._ends[-1]) if self.paths else 0

    def files(self) -> Iterator[SourceFile]:
        """Yields a description of each shard; the sizes are those at the time when the shard was opened."""
        for path, index in zip(self.paths, self._indices, strict=True):
            yield SourceFile(os.path.basename(path), index.tar_size, len(index))

    @property
    def skipped(self) -> dict[str, Skipped]:
        """Returns the number of skipped members for each reason, with one example.

        Tars without samples are counted too, under a reason of their own.
        """
        total: dict[str, Skipped] = {}
        for path, index in zip(self.paths, self._indices, strict=True):
            if not len(index):
                count, example = total.get(_EMPTY, (0, path))
                total[_EMPTY] = Skipped(count + 1, example)
            for reason, found in index.skipped.items():
                count, example = total.get(reason, (0, f"{path}:{found.example}"))
                total[reason] = Skipped(count + found.num_members, example)
        return total

    def name(self, index: int) -> str:
        """Returns the shard's path and the key of a sample, for messages."""
        shard, record = self._record(index)
        return _name(self.paths[shard], record)

    def key(self, index: int) -> str:
        """Returns the key of a sample: the path in the tar, without extension."""
        _, record = self._record(index)
        return str(record["key"].decode("utf-8", "surrogateescape"))

    def image(self, index: int, min_side: int | None = None) -> Image.Image:
        """Decodes the image of a sample, upright and in RGB.

        Args:
            index: index of the sample, from 0.
            min_side: minimum pixels of the shorter side if a large JPEG is decoded at a reduced size
                (`decoding.decode_image`). None decodes all pixels.

        Raises:
            BrokenRecordError: if the sample has no image, or the image cannot be read.
        """
        shard, record = self._record(index)
        return self._decode_image(shard, record, self._read(shard, record, "image"), min_side)

    def caption(self, index: int) -> str:
        """Returns the caption of a sample, without surrounding white space.

        Raises:
            BrokenRecordError: if the sample has no caption, or the caption cannot be read.
        """
        shard, record = self._record(index)
        return self._decode_caption(shard, record, self._read(shard, record, "caption"))

    def pair(self, index: int, min_side: int | None = None) -> tuple[Image.Image, str]:
        """Returns the image and the caption of a sample; reads both at once if the gap between them in the tar is
        small.

        Args:
            index: index of the sample, from 0.
            min_side: minimum pixels of the shorter side (`decoding.decode_image`); None decodes all pixels.

        Raises:
            BrokenRecordError: if the image or the caption is missing or cannot be read.
            StorageError: if the file system fails.
        """
        shard, record = self._record(index)
        caption_data, image_data = self._read_both(shard, record)
        caption = self._decode_caption(shard, record, caption_data)
        return self._decode_image(shard, record, image_data, min_side), caption

    def _decode_image(self, shard: int, record: np.void, data: bytes, min_side: int | None) -> Image.Image:
        try:
            return decode_image(data, min_side)
        except ValueError as error:
            raise BrokenRecordError(f"{_name(self.paths[shard], record)}: broken image: {error}") from error

    def _decode_caption(self, shard: int, record: np.void, data: bytes) -> str:
        try:
            return decode_json_caption(data) if record["caption_is_json"] else decode_caption(data)
        except ValueError as error:
            raise BrokenRecordError(f"{_name(self.paths[shard], record)}: broken caption: {error}") from error

    def _read_both(self, shard: int, record: np.void) -> tuple[bytes, bytes]:
        """Returns the caption's bytes and the image's bytes of a sample.

        Reads both at once if the gap between them in the tar is small.
        """
        extents = [_extent(self.paths[shard], record, kind) for kind in ("caption", "image")]
        start, end = min(offset for offset, _ in extents), max(offset + size for offset, size in extents)
        if end - start > sum(size for _, size in extents) + _MAX_GAP:
            return self._read(shard, record, "caption"), self._read(shard, record, "image")
        data = self._read_range(shard, record, start, end - start)
        caption, image = (data[offset - start : offset - start + size] for offset, size in extents)
        return caption, image

    def _read(self, shard: int, record: np.void, kind: str) -> bytes:
        return self._read_range(shard, record, *_extent(self.paths[shard], record, kind))

    def _read_range(self, shard: int, record: np.void, offset: int, size: int) -> bytes:
        tar, index = self.paths[shard], self._indices[shard]
        expected = index.tar_size, index.tar_mtime_ns
        try:
            data = read_with_retries(
                lambda: self._files.read(tar, offset, size, expected), tar, file_errors=frozenset()
            )
        except (FileChangedError, ValueError, OverflowError) as error:  # the tar was replaced, or the index is damaged
            raise BrokenRecordError(f"{_name(tar, record)}: {error}") from error
        if len(data) < size:
            raise BrokenRecordError(
                f"{_name(tar, record)}: only {len(data)} of {size} bytes left; has the shard changed?"
            )
        return data

    def _record(self, index: int) -> tuple[int, np.void]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        found = self._indices[shard]
        number = index - int(self._ends[shard]) + len(found)
        return shard, found.record(number)


def _open_indices(tars: Sequence[str], cache_dir: str | None, files: OpenFiles) -> list[ShardIndex | StoredIndex]:
    """Opens the indices of all tars in several threads, because a shared file system takes long per request."""
    with ThreadPoolExecutor(_OPENING_THREADS) as pool:
        return list(pool.map(lambda tar: _open_index(tar, cache_dir, files), tars))


def _open_index(tar: str, cache_dir: str | None, files: OpenFiles) -> ShardIndex | StoredIndex:
    if cache_dir is not None:
        path = index_path(cache_dir, tar)
        if os.path.exists(path):
            return StoredIndex(path, tar, files)
    return scan_shard(tar)


def _shorten(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"none of {len(paths)} tars, {paths[0]} to {paths[-1]},"


def _describe_skipped(skipped: Mapping[str, Skipped]) -> str:
    reasons = [f"{found.num_members:,} {reason} ({found.example})" for reason, found in skipped.items()]
    return f": left out are {'; '.join(reasons)}" if reasons else ""


def _name(tar: str, record: np.void) -> str:
    return printable(f"{tar}:{record['key'].decode('utf-8', 'backslashreplace')}")


def _extent(tar: str, record: np.void, kind: str) -> tuple[int, int]:
    """Returns the offset and the size in bytes of a sample's image or caption.

    Raises:
        BrokenRecordError: if the image or caption is missing or too large.
    """
    extensions, limit = _KINDS[kind]
    offset, size = int(record[kind]["offset"]), int(record[kind]["size"])
    if size == NO_MEMBER:
        raise BrokenRecordError(f"{_name(tar, record)}: no {kind} (.{', .'.join(extensions)})")
    if not 0 <= size <= limit:
        raise BrokenRecordError(f"{_name(tar, record)}: {kind} of {size} bytes exceeds the limit of {limit}")
    return offset, size
