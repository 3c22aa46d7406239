"""Tests files of any name, encoding and content: each sample is read unchanged, skipped with a reason, or refused.

Each case writes files with known content and then counts: samples read, samples that break when read, and samples
skipped by reason. The counts must add up, and no sample may be read as another.
"""

import gzip
import json
import os
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beit3_ds.config import ConfigError
from beit3_ds.data.files.patterns import expand_patterns
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.images.folder import ImageFolder
from beit3_ds.data.images.shard_scan import scan_shard
from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.images.source import ImageSource
from beit3_ds.data.prepare.index import prepare_indices
from beit3_ds.data.text.paragraphs import BrokenLines, cut_into_pieces, read_paragraphs

FAST, SLOW = 60, 1000  # cases
fast_and_slow = pytest.mark.parametrize(
    "cases", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["fast", "slow"]
)


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _run(cases: int, test: object) -> None:
    """Runs a property test on a number of cases."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings(max_examples=cases, deadline=None, suppress_health_check=checks, derandomize=True)(test)()  # type: ignore[operator]


# Images and captions, in tars and folders.

STEMS = st.sampled_from(
    ["a", "b", "v.one", "v.two", "v", "1.5 m", "\u00c4 \u96ea", ".hidden", "n" * 230, "caf\udce9", "x y", "a.b.c"]
)
EXTENSIONS = st.sampled_from(
    ["jpg", "JPG", "jpeg", "png", "PNG", "webp", "tif", "txt", "TXT", "json", "avif", "cls", "npy", "txt.gz", "seg.png"]
)
FOLDERS = st.sampled_from(["", "", "n01", "n02/deep", "v.1"])
NAMES = st.builds(lambda folder, stem, end: os.path.join(folder, f"{stem}.{end}"), FOLDERS, STEMS, EXTENSIONS)
CONTENTS = st.sampled_from(["good", "good", "good", "empty", "binary", "latin", "utf-16", "cut"])
MEMBERS = st.dictionaries(NAMES, CONTENTS, max_size=12)
IMAGES = ("jpg", "jpeg", "png", "webp", "tif")


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _content(name: str, kind: str, png: bytes) -> bytes:
    if kind == "good":
        if _extension(name) in IMAGES:
            return png
        caption = f"caption of {name}".encode("utf-8", "backslashreplace").decode()
        return (json.dumps({"caption": caption}) if name.endswith("json") else caption).encode()
    text = "\u00e9t\u00e9 of an image"
    contents = {"empty": b"", "binary": bytes(range(256)), "latin": text.encode("latin-1")}
    contents |= {"utf-16": text.encode("utf-16"), "cut": png[: len(png) // 2]}
    return contents[kind]


def _read(source: ImageSource, files: Mapping[str, str]) -> Counter[str]:
    """Reads all samples; counts the results for images and captions."""
    counts: Counter[str] = Counter()
    for index in range(len(source)):
        for what, read in (("image", source.image), ("caption", source.caption)):
            try:
                found = read(index)
            except BrokenRecordError as error:
                assert source.name(index) in str(error)  # noqa: PT017, what is raised is one of two right ways
                absent = f"no {what} (" in str(error) or "No such file" in str(error)
                counts[f"no {what}" if absent else f"broken {what}"] += 1
                continue
            counts[what] += 1
            if what == "caption":
                # catches bytes of another encoding read as text, and the caption of another sample
                assert isinstance(found, str)
                stem = source.name(index).rpartition(":")[2].rpartition("/")[2]
                stem = stem if isinstance(source, TarShards) else os.path.splitext(stem)[0]
                own = found.rpartition("/")[2].removeprefix("caption of ").rpartition(".")[0]
                assert own == stem.replace("\\xe9", "\\udce9"), (own, stem)
    counts["left out"] = sum(found.num_members for found in source.skipped.values())
    assert counts["image"] <= sum(kind == "good" and _extension(name) in IMAGES for name, kind in files.items())
    return counts


@fast_and_slow
def test_members_of_tars(cases: int, png: bytes) -> None:
    @given(members=MEMBERS, tar_format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    def check(members: dict[str, str], tar_format: int) -> None:
        with _folder() as folder:
            path = folder / "s.tar"
            with tarfile.open(path, "w", format=tar_format, errors="surrogateescape") as archive:
                for name, kind in members.items():
                    data = _content(name, kind, png)
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, BytesIO(data))
            index = scan_shard(str(path))
            left_out = sum(found.num_members for found in index.skipped.values())
            if not len(index):
                assert left_out == len(members)
                with pytest.raises(ConfigError, match="holds no samples"):
                    TarShards([str(path)])
                return
            scanned = TarShards([str(path)])
            counts = _read(scanned, members)
            keys = [record["key"].decode("utf-8", "surrogateescape") for record in index.records]
            lower = {f"{name.rpartition('.')[0]}.{_extension(name)}" for name in members}
            metadata = sum(f"{key}.txt" in lower and f"{key}.json" in lower for key in keys)
            used = counts["image"] + counts["broken image"] + counts["caption"] + counts["broken caption"]
            # Every member is an image, a caption, JSON beside a caption, or left out: none is lost or counts twice.
            assert used + metadata + left_out == len(members)
            prepare_indices([str(path)], str(folder), num_processes=1)
            indexed = TarShards([str(path)], str(folder))
            assert indexed.skipped == scanned.skipped
            assert [indexed.name(i) for i in range(len(indexed))] == [scanned.name(i) for i in range(len(scanned))]

    _run(cases, check)


@fast_and_slow
def test_files_and_links_of_folders(cases: int, png: bytes) -> None:
    links = st.lists(st.sampled_from(["class", "loop", "file out", "dangling"]), unique=True)

    @given(members=MEMBERS, links=links)
    def check(members: dict[str, str], links: list[str]) -> None:
        with _folder() as folder:
            root, files = folder / "root", dict(members)
            for name, kind in members.items():
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(_content(name, kind, png))
            root.mkdir(exist_ok=True)
            (folder / "out").mkdir()
            (folder / "out/linked.png").write_bytes(png)
            targets = {"class": "../out", "loop": "..", "file out.png": "../out/linked.png", "dangling.png": "nowhere"}
            for name, target in targets.items():
                if name.removesuffix(".png") in links:
                    (root / name).symlink_to(target)
            if {"class", "loop"}.intersection(links):  # the loop leads to the folder above
                files["linked.png"] = "good"
            visible = [name for name in files if not os.path.basename(name).startswith(".")]
            images = [name for name in visible if _extension(name) in IMAGES]
            if not images:
                with pytest.raises(ConfigError, match="no image"):
                    ImageFolder(str(root))
                return
            source = ImageFolder(str(root))
            names = [source.name(index) for index in range(len(source))]
            assert len(set(names)) == len(names) == len(images)  # catches images lost, or listed twice through links
            counts = _read(source, files)
            assert counts["image"] == sum(files[name] == "good" for name in images)
            stems = {os.path.splitext(name)[0] for name in images}
            beside = {
                name for name in visible if _extension(name) in ("txt", "json") and os.path.splitext(name)[0] in stems
            }
            beside -= {name for name in beside if name.endswith("TXT") and f"{name[:-3]}txt" in beside}
            # Nothing is lost: every file is an image, a text beside an image, or left out; so is every link.
            links_left_out = len({"file out", "dangling"}.intersection(links))
            again = source.skipped.get("folder that was listed by another path")
            assert bool(again) == ("loop" in links)
            counts["left out"] -= again.num_members if again else 0
            assert len(images) + len(beside) + counts["left out"] == len(files) + links_left_out

    _run(cases, check)


# Texts.

FOREIGN = "\u00e9t\u00e9 \u96ea".encode()
TEXTS = (b"plain words", FOREIGN, b"{", b"x" * 5000)
LINES = st.lists(
    st.sampled_from([*TEXTS, b"", b" ", b"caf\xe9", b"nul\0byte", b"\x01\x02 \x03"]),
    max_size=8,
)
JSON_EXTENSIONS = (".jsonl", ".JSONL", ".ndjson", ".jsonlines", ".json")
OTHER_EXTENSIONS = (".csv", ".tar", ".png")
COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".GZ": gzip.compress, ".zst": zstandard.compress}


@fast_and_slow
def test_text_files(cases: int) -> None:
    @given(
        lines=LINES,
        extension=st.sampled_from(["", ".txt", ".TXT", ".md", *JSON_EXTENSIONS, *OTHER_EXTENSIONS]),
        compression=st.sampled_from(list(COMPRESSIONS)),
        disguise=st.sampled_from(["", "", "", "bom", "utf-16", "gzip", "list", "cut"]),
        newline=st.sampled_from([b"\n", b"\r\n", b"\r"]),
        piece=st.integers(1, 60),
    )
    def check(lines: list[bytes], extension: str, compression: str, disguise: str, newline: bytes, piece: int) -> None:
        texts = [line.decode() for line in lines if line in TEXTS]
        num_broken = sum(1 for line in lines if line.strip() and line not in TEXTS)
        data = newline.join(lines)
        if extension in JSON_EXTENSIONS:
            data = newline.join(json.dumps({"text": x.decode()}).encode() if x in TEXTS else x for x in lines)
            if disguise == "list":
                data, num_broken = json.dumps([{"text": text} for text in texts], indent=1).encode(), 0
        data = {"bom": b"\xef\xbb\xbf" + data, "gzip": gzip.compress(data)}.get(disguise, data)
        data = "\n".join(texts).encode("utf-16") if disguise == "utf-16" else data
        is_cut = disguise == "cut" and bool(compression)
        data = COMPRESSIONS[compression](data)[: -3 if is_cut else None]
        is_other = extension in OTHER_EXTENSIONS or disguise in ("utf-16", "gzip") or is_cut
        with _folder() as folder:
            path = folder / f"name{extension}{compression}"
            path.write_bytes(data)
            broken = BrokenLines(10**9)

            def read() -> list[str]:
                (file,) = expand_patterns([str(folder / "*")])
                return [p.text for part in cut_into_pieces(file, piece) for p in read_paragraphs(part, broken)]

            if is_other:
                with pytest.raises(ConfigError, match=str(folder)):
                    read()
                return
            try:
                paragraphs = read()
            except ConfigError:
                # JSON whose values are not one a line cannot be read on behind damage.
                assert extension == ".json"
                assert num_broken
                return
            # catches a line that is neither read nor counted, and one that is read as what it is not
            assert paragraphs == texts
            assert len(broken.lines) == num_broken

    _run(cases, check)
