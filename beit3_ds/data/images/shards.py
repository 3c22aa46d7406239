"""Random access to the images and captions in WebDataset tar shards, without unpacking them."""

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
from beit3_ds.data.files.printing import printable
from beit3_ds.data.files.reading import read_with_retries
from beit3_ds.data.files.records import BrokenRecordError, Skipped
from beit3_ds.data.images.captions import MAX_JSON_BYTES, decode_caption, decode_json_caption
from beit3_ds.data.images.decoding import MAX_IMAGE_BYTES, decode_image
from beit3_ds.data.images.shard_index import NO_MEMBER, ShardIndex, StoredIndex, index_path
from beit3_ds.data.images.shard_scan import CAPTION_EXTENSIONS, scan_shard

_EMPTY = "tar without samples"
_MAX_GAP = 1 << 18  # bytes between the image and the caption of a sample that are read along rather than skipped
_OPENING_THREADS = 16
_KINDS = {"image": (IMAGE_EXTENSIONS, MAX_IMAGE_BYTES), "caption": (CAPTION_EXTENSIONS, MAX_JSON_BYTES)}


class TarShards:
    """The samples of uncompressed tar files, in the order of files and of each sample's first member.

    The members `folder/KEY.webp` and `folder/KEY.txt` are the image and the caption of the sample `folder/KEY`. Without
    `KEY.txt` the caption is the value of `caption` in `KEY.json`. A key may hold dots: `v.one.jpg` and `v.two.jpg` are
    two samples. WebDataset ends a key at its first dot instead, for samples of several parts: beside `KEY.jpg`,
    `KEY.txt` or `KEY.json`, `KEY.seg.png` is a further part of that sample and is left out. So every member that is a
    sample by either rule is read or counted. All other members are counted in `skipped`.

    What real corpora hold, and how it is handled:

    | found | rule |
    |---|---|
    | tar cut off, also between two members; damaged header; second tar appended | refused: `ConfigError` |
    | tar unlike its index in size or modification time | refused: `ConfigError` |
    | changed bytes under an old date | found by `beit3 prepare index --verify` |
    | a repeated name; a second image or a further part of a sample | the first counts, the others are in `skipped` |
    | hidden files; other extensions, image formats that are not read | in `skipped` |
    | tar without samples | in `skipped`; refused if no tar has any: `ConfigError` |
    | tar or index gone, unreadable after retries | the run ends: `StorageError` |
    | links, devices, sparse files, names with `..` or a leading `/` | never read, in `skipped` |
    | image empty, cut off, too large, no image, of unknown white | `BrokenRecordError` |
    | image under another format's extension | read: the content tells |
    | grey, palette, CMYK, 16 bits, alpha, animation, EXIF rotation | upright RGB on white, first frame |
    | caption missing, empty, too long, not UTF-8, with NUL or half a surrogate pair | `BrokenRecordError` |

    Opening reads the headers of the index files in `cache_dir`. Without an index file it reads the tar's headers and
    keeps about 50 bytes per sample in each process. Indices are mapped and tars stay open (`OpenFiles`), so an image, a
    caption, or a pair whose members are neighbours in the tar takes one read and no open. Instances may be pickled.
    """

    def __init__(self, patterns: Iterable[str], cache_dir: str | None = None, files: OpenFiles | None = None) -> None:
        """Finds the files and their indices.

        Args:
            patterns: files or glob patterns.
            cache_dir: the folder that `beit3 prepare index` wrote; None scans.
            files: keeps tars and indices open; None uses a new `OpenFiles`.

        Raises:
            ConfigError: for a pattern without a match; for a file that is unreadable, not a tar, damaged, truncated or
                changed since it was indexed; or if no tar has a sample.
            StorageError: if the file system fails.
        """
        self.paths = expand_patterns(patterns)
        self._files = files or OpenFiles()
        self._indices = _open_indices(self.paths, cache_dir, self._files)
        self._ends = np.cumsum([len(index) for index in self._indices])
        if not len(self):
            raise ConfigError(f"data: {_shorten(self.paths)} holds no samples{_all_left_out(self.skipped)}.")

    def __len__(self) -> int:
        """Samples in all shards, broken ones included: what stands where must not depend on what can be read."""
        return int(self._ends[-1]) if self.paths else 0

    def files(self) -> Iterator[SourceFile]:
        """Yields the shards, with the sizes that they had when they were opened."""
        for path, index in zip(self.paths, self._indices, strict=True):
            yield SourceFile(os.path.basename(path), index.tar_size, len(index))

    @property
    def skipped(self) -> dict[str, Skipped]:
        """Members of all shards that are left out, by reason; an example is named with its shard."""
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
        """Shard and key of a sample, for messages."""
        shard, record = self._record(index)
        return _name(self.paths[shard], record)

    def image(self, index: int, min_side: int | None = None) -> Image.Image:
        """Decodes the image of a sample, upright and in RGB.

        Raises:
            BrokenRecordError: if it has none, or one that cannot be read.
        """
        shard, record = self._record(index)
        return self._decode_image(shard, record, self._read(shard, record, "image"), min_side)

    def caption(self, index: int) -> str:
        """Returns the caption of a sample, without white space around it.

        Raises:
            BrokenRecordError: if it has none, or one that cannot be read.
        """
        shard, record = self._record(index)
        return self._decode_caption(shard, record, self._read(shard, record, "caption"))

    def pair(self, index: int, min_side: int | None = None) -> tuple[Image.Image, str]:
        """Returns the image and the caption of a sample; one read fetches both if they are neighbours in the tar.

        Raises:
            BrokenRecordError: if either is missing or cannot be read.
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
        """Returns the bytes of the caption and of the image."""
        places = [_place(self.paths[shard], record, kind) for kind in ("caption", "image")]
        start, end = min(offset for offset, _ in places), max(offset + size for offset, size in places)
        if end - start > sum(size for _, size in places) + _MAX_GAP:
            return self._read(shard, record, "caption"), self._read(shard, record, "image")
        data = self._read_range(shard, record, start, end - start)
        caption, image = (data[offset - start : offset - start + size] for offset, size in places)
        return caption, image

    def _read(self, shard: int, record: np.void, kind: str) -> bytes:
        return self._read_range(shard, record, *_place(self.paths[shard], record, kind))

    def _read_range(self, shard: int, record: np.void, offset: int, size: int) -> bytes:
        tar, index = self.paths[shard], self._indices[shard]
        expected = index.tar_size, index.tar_mtime_ns
        try:
            data = read_with_retries(
                lambda: self._files.read(tar, offset, size, expected), tar, file_errors=frozenset()
            )
        except (FileChangedError, ValueError, OverflowError) as error:  # another tar, or a damaged index
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
    """Opens the index of every tar, many at a time, because a shared file system answers slowly but in parallel."""
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


def _all_left_out(skipped: Mapping[str, Skipped]) -> str:
    reasons = [f"{found.num_members:,} {reason} ({found.example})" for reason, found in skipped.items()]
    return f": left out are {'; '.join(reasons)}" if reasons else ""


def _name(tar: str, record: np.void) -> str:
    return printable(f"{tar}:{record['key'].decode('utf-8', 'backslashreplace')}")


def _place(tar: str, record: np.void, kind: str) -> tuple[int, int]:
    """Returns offset and size of a sample's image or caption.

    Raises:
        BrokenRecordError: if it is missing or too large.
    """
    extensions, limit = _KINDS[kind]
    offset, size = int(record[kind]["offset"]), int(record[kind]["size"])
    if size == NO_MEMBER:
        raise BrokenRecordError(f"{_name(tar, record)}: no {kind} (.{', .'.join(extensions)})")
    if not 0 <= size <= limit:
        raise BrokenRecordError(f"{_name(tar, record)}: {kind} of {size} bytes exceeds the limit of {limit}")
    return offset, size
