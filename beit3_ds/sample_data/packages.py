"""Reads the public packages from which the sample data is built.

Every reader yields its records in a fixed order, so the result of a build depends only on the packages.
"""

import html
import json
import random
import re
import shutil
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


class PackageError(ValueError):
    """Reports a package that is missing, ambiguous or of an unknown format."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Holds one image and its text, before selection and processing."""

    name: str
    """Path inside the package; unique within the package."""
    series: str
    """Name of a series of similar images; training and validation samples never share a series."""
    category: str
    """Label for balancing the selection of images; empty for pairs."""
    text: str
    """Text stored with the image: a caption, or a JSON object."""
    image: Path | bytes
    """Bytes of the encoded image, or path of the image file."""


def find_package(folder: Path, pattern: str, how: str) -> Path:
    """Returns the only file in `folder` that matches `pattern`.

    Args:
        folder: folder of the packages.
        pattern: glob pattern of the file name.
        how: command that downloads the file, for the error message.

    Raises:
        PackageError: if no file or several files match.
    """
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise PackageError(
            f"sample_data: expected one file {pattern} in {folder}, found {names}. Fetch it with `{how}`, "
            f"and keep one version of it there."
        )
    return found[0]


def unpack_deb(folder: Path, package: str, out: Path) -> None:
    """Unpacks the .deb file of a package into the folder `out`.

    Raises:
        PackageError: if the .deb file or the program dpkg-deb is missing.
    """
    deb = find_package(folder, f"{package}_*.deb", f"apt-get download {package}")
    if shutil.which("dpkg-deb") is None:
        raise PackageError("sample_data: dpkg-deb is not on the PATH; it unpacks .deb files (package dpkg).")
    subprocess.run(["dpkg-deb", "-x", str(deb), str(out)], check=True)


# --- Image-text pairs: Fluent emoji with the English annotations of CLDR ---

_SKIN_TONES = range(0x1F3FB, 0x1F400)
_ZODIAC = {*range(0x2648, 0x2654), 0x26CE}  # white glyphs on the same purple square
_STEM = re.compile(r"[0-9a-f]{2,6}(?:-[0-9a-f]{2,6})*")
# Letters, arrows and plain shapes are like text on a tile, so they teach little about pictures.
_DULL = re.compile(
    r"button|keycap|Japanese “|(?<!bow and )\barrows?\b|middle finger|\bM\b|^(plus|minus|divide|multiply|infinity)$|"
    r"\b(circle|square|diamond|triangle|mark|suit|symbol|sign|loop|dash|asterisk|input|registered|copyright)$|"
    r"^(input|up-|down-|left-|right-|om$|sparkle$|information|ZZZ|ATM|trade)|\bpointed\b"
)
_GENDERED = re.compile(r"^(man|woman|men|women)\b")
_MODIFIER = re.compile(
    "man|woman|men|women|boy|girl|person|people|child|old|older|mrs.|mx|santa|prince|princess|"
    "red|orange|yellow|green|blue|purple|brown|black|white|grey|pink|light|"
    "left|right|up|down|leftwards|rightwards|backhand|upside-down|large|small|medium|low|high|"
    "open|closed|oncoming|opening|empty|no|non-potable|potable|1st|2nd|3rd"
)
_KEYWORD = re.compile(r"[A-Za-z][a-zé'\u2019 -]{2,}")
_SLANG = {"ily", "xoxo", "bae", "omg", "litaf", "jel", "roflmao", "roflcopter", "pissed", "guapi", "duh", "ugh"}


def _emoji_series(name: str) -> str:
    """Returns an emoji's name without colour, direction, size and gender, such as `apple` for `green apple`."""
    if "o\u2019clock" in name or name.endswith("-thirty"):
        return "clock face"
    if "moon" in name and "cake" not in name:
        return "moon"
    if re.fullmatch(r"mer(maid|man|person)", name):
        return "merperson"
    words = [word for word in re.split(r"[ :]+", name.lower()) if not _MODIFIER.fullmatch(word)]
    return " ".join(words) or name


def _caption(name: str, keywords: list[str]) -> str:
    """Returns an emoji's name and up to six of its keywords, such as `roller coaster: amusement, park, theme`."""
    draw = random.Random(f"caption {name}")
    said = set(re.findall(r"\w+", name.lower()))
    fit = [
        word
        for word in keywords
        if _KEYWORD.fullmatch(word)
        and re.search("[aeiouy]", word.lower())
        and word.lower() not in _SLANG
        and not said >= set(re.findall(r"\w+", word.lower()))
    ]
    count = min(len(fit), draw.choice((0, 1, 2, 3, 3, 4, 5, 6)))
    kept = [fit[i] for i in sorted(draw.sample(range(len(fit)), count))]
    spoken = name.replace(": ", " with ")
    return f"{spoken}: {', '.join(kept)}" if kept else spoken


def _read_annotations(archive: Path) -> dict[str, tuple[str, list[str]]]:
    """Maps each emoji that has an English name to this name and the keywords. Keys have no variation selectors."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/annotations/en/annotations.json")
        assert member is not None, "tarfile.extractfile gives None for directories only"
        table = json.load(member)["annotations"]["annotations"]
    return {
        character.replace("\ufe0f", ""): (entry["tts"][0], entry.get("default", []))
        for character, entry in table.items()
        if "tts" in entry
    }


def read_pairs(folder: Path) -> Iterator[Candidate]:
    """Yields emoji images with English names; leaves out skin tones, letters, arrows and plain shapes.

    A gendered variant is left out if a neutral form exists.
    """
    how = "npm pack @lobehub/fluent-emoji-3d cldr-annotations-full"
    annotations = _read_annotations(find_package(folder, "cldr-annotations-full-*.tgz", how))
    names = {name for name, _ in annotations.values()}
    seen: set[str] = set()
    with tarfile.open(find_package(folder, "lobehub-fluent-emoji-3d-*.tgz", how)) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            stem = Path(member.name).stem
            if not member.name.endswith(".webp") or not _STEM.fullmatch(stem):
                continue
            codes = [int(code, 16) for code in stem.split("-")]
            character = "".join(map(chr, codes)).replace("\ufe0f", "")
            if character in seen or character not in annotations:
                continue
            name, keywords = annotations[character]
            neutral = {_GENDERED.sub(who, name).strip() for who in ("person", "people", "")}
            gendered = _GENDERED.match(name) is not None and bool(neutral & names)
            if gendered or _DULL.search(name) or any(c in _SKIN_TONES or c in _ZODIAC for c in codes):
                continue
            seen.add(character)
            data = tar.extractfile(member)
            assert data is not None, "an asset is a plain file"
            yield Candidate(
                name=stem,
                series=_emoji_series(name),
                category="",
                text=_caption(name, keywords),
                image=data.read(),
            )


# --- Labelled images: Open Clip Art ---

CATEGORIES = (
    "animals",
    "buildings",
    "computer",
    "food",
    "geography",
    "people",
    "plants",
    "recreation",
    "transportation",
)
_LICENSE = re.compile(r'<cc:license\s+rdf:resource="([^"]*)"', re.IGNORECASE)
_PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"
_SET_TITLE = re.compile(r"Clipart by|theme|iconset|Icons|^people$")  # a title of a set; the file name says more
_UNUSABLE = re.compile(r"<image\b|Road Signs</dc:title>")  # contains a raster image; or is one of fifty similar signs
_NUMBER = re.compile(r"[\W_\d]+$")  # flower_01, flower_02: one series
_TITLE = re.compile(r"<dc:title>(.*?)</dc:title>", re.DOTALL)
# Excludes weapons, underwear and likenesses of private people; marks and characters that belong to someone; tiles,
# cards, diagrams and stick figures, which all look the same; and, in the last line, broken or misfiled files.
_LEFT_OUT = re.compile(
    r"weapons|pantyhose|nude|naked|sexy|cigar|smok|hitler|lenin|marx|"
    r"self_portrait|youngster|grandpa|happy_boy|man_singing|man_face_darek|lovely_baby|"
    r"pac_?k?man|chomper|/pong|xbill|tetris|atari|hacker|coca|pepsi|firefox|mozilla|windows|apple_logo|tux|debian|"
    r"java|ubuntu|gnome|inkscape|gimp|lyx|ipod|nintendo|gameboy|quake|cisco|garmin|lego|playboy|domo_kun|bart_|"
    r"samba|_kde|cannabis|bmw|/otto_|beckham|brozo|theme/apps/|icons/applications|chav_|"
    r"coat_of_arms|/cards/|/diagrams/|/roadsigns/|mimetypes|emblems|/buttons/|jigsaw|hotel_icon|stickmen|"
    r"creation_day|boating/(sailing_|boating_|knot_)|"
    r"stylized_yoga_person_ger_04|human_humain|pruner|bowsaw|palette|70a009|1leftarrow",
    re.IGNORECASE,
)


def read_clipart(folder: Path, scratch: Path) -> Iterator[Candidate]:
    """Yields PNG images of the categories in `CATEGORIES` that are in the public domain; leaves out unsuitable images.

    The licence of an image is read from the SVG file of the same name. Images without such a file are left out.

    Args:
        folder: folder with the .deb files of the packages openclipart-png and openclipart-svg.
        scratch: empty folder for the unpacked files; it must exist as long as the candidates are used.
    """
    for package in ("openclipart-png", "openclipart-svg"):
        unpack_deb(folder, package, scratch)
    root = scratch / "usr" / "share" / "openclipart"
    for png in sorted((root / "png").rglob("*.png")):
        path = png.relative_to(root / "png")
        svg = (root / "svg" / path).with_suffix(".svg")
        category = path.parts[0]
        if category not in CATEGORIES or _LEFT_OUT.search(f"/{path}") or png.is_symlink() or not svg.is_file():
            continue
        markup = svg.read_text(encoding="utf-8", errors="replace")
        if set(_LICENSE.findall(markup)) != {_PUBLIC_DOMAIN} or _UNUSABLE.search(markup):
            continue
        title = _TITLE.search(markup)
        words = " ".join(html.unescape(title.group(1)).split()) if title else ""
        if not words or _SET_TITLE.search(words):
            words = path.stem.replace("_", " ").strip()
        record = {
            "category": category,
            "title": words,
            "source": str(path),
        }
        yield Candidate(
            name=str(path),
            series=f"{path.parent}/{_NUMBER.sub('', path.stem.lower()) or path.stem}",
            category=category,
            text=json.dumps(record, ensure_ascii=False),
            image=png,
        )


# --- Prose: the novels of Jane Austen ---


def _read_strings(record: bytes) -> list[str]:
    """Decodes a character vector from an R serialisation (format 3, big-endian XDR)."""
    if record[:6] != b"X\n\x00\x00\x00\x03":
        raise PackageError(f"sample_data: expected an R serialisation of format 3, got {record[:6]!r}.")
    (encoding_length,) = struct.unpack_from(">I", record, 14)
    at = 18 + encoding_length
    kind, count = struct.unpack_from(">II", record, at)
    if kind & 0xFF != 16:  # STRSXP
        raise PackageError(f"sample_data: expected an R character vector (type 16), got type {kind & 0xFF}.")
    at += 8
    strings = []
    for _ in range(count):
        _, length = struct.unpack_from(">Ii", record, at)
        at += 8
        strings.append(record[at : at + length].decode("utf-8"))
        at += length
    return strings


def read_novels(folder: Path, scratch: Path) -> dict[str, list[str]]:
    """Returns the lines of each novel in the package r-cran-janeaustenr, by title in capitals.

    Args:
        folder: folder with the .deb file.
        scratch: folder for the unpacked files.
    """
    unpack_deb(folder, "r-cran-janeaustenr", scratch)
    database = scratch / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    rest, novels = database.read_bytes(), {}
    while rest:
        inflate = zlib.decompressobj()
        lines = _read_strings(inflate.decompress(rest[4:]))  # a record is its length in 4 bytes, then zlib
        novels[lines[0].upper()] = lines
        rest = inflate.unused_data
    return novels
