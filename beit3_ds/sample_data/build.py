"""Rebuilds the sample data from public packages: `python -m beit3_ds.sample_data.build --help`.

Equal packages and an equal Pillow version give equal bytes; WebP encoders differ between versions.
"""

import argparse
import hashlib
import io
import random
import re
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from beit3_ds.sample_data.packages import Candidate, PackageError, read_clipart, read_novels, read_pairs

# A tar member costs a 512-byte header and whole 512-byte blocks, so a sample with an image of at most 1024
# bytes takes 2.5 kB. These sizes keep everything, this file included, below MAX_TOTAL_BYTES.
MAX_TOTAL_BYTES = 5_000_000
MAX_IMAGE_BYTES = 1024
IMAGE_SIZE = 64  # pixels, square
NUM_PAIRS = 880
NUM_IMAGES_PER_CATEGORY = 80
PAIRS_VALIDATION_FRACTION = 0.10
IMAGES_VALIDATION_FRACTION = 0.15
MAX_INPUT_PIXELS = 16_000_000

# First and last chapter of each novel, in this order; the very last chapters are for validation.
CHAPTERS = {"NORTHANGER ABBEY": (1, 28), "PERSUASION": (1, 24)}
NUM_VALIDATION_CHAPTERS = 2

OUTPUTS = (
    "pairs-train.tar",
    "pairs-validation.tar",
    "images-train.tar",
    "images-validation.tar",
    "text-train.txt",
    "text-validation.txt",
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Holds an image that may become part of the sample data, as it was found and as a resized WebP file."""

    candidate: Candidate
    webp: bytes
    shape: npt.NDArray[np.float32]
    """Vector for comparing images, (256,) float32: the luminance at 16 x 16 pixels, shifted to mean 0 and scaled to
    norm 1. The dot product of the vectors of two images is the images' correlation."""
    vivid: bool
    """Whether the image has strong colours, enough non-white pixels and enough detail; such samples are chosen first.
    """


def _render(image: Image.Image) -> Image.Image:
    """Crops an image to its visible part, pads it to a white square with a margin of 4%, and resizes it."""
    rgba = image.convert("RGBA")
    box = rgba.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    rgba = rgba.crop(box) if box else rgba
    side = max(rgba.size)
    margin = round(0.04 * side)
    canvas = Image.new("RGBA", (side + 2 * margin, side + 2 * margin), "white")
    canvas.alpha_composite(rgba, ((side - rgba.width) // 2 + margin, (side - rgba.height) // 2 + margin))
    return canvas.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _encode(image: Image.Image) -> bytes:
    """Encodes an image as WebP. Tries eight qualities from the highest, until the result has at most MAX_IMAGE_BYTES.

    If all results are larger, the image has the lowest quality.
    """
    data = b""
    for quality in (85, 80, 75, 70, 65, 60, 55, 50):
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=quality, method=6)
        data = buffer.getvalue()
        if len(data) <= MAX_IMAGE_BYTES:
            break
    return data


def _process(candidate: Candidate) -> Sample | None:
    """Processes a candidate's image; returns None if the image is unsuitable.

    An image is unsuitable if it is too large, too small, nearly empty, black line art or of one flat colour.
    """
    file = io.BytesIO(candidate.image) if isinstance(candidate.image, bytes) else candidate.image
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(file) as opened,
        ):  # the size is checked here
            if opened.width * opened.height > MAX_INPUT_PIXELS or min(opened.size) < 48:
                return None
            image = _render(opened)
    except Image.DecompressionBombError:  # opening raises it: some clip art claims 600 megapixels
        return None
    pixels = np.asarray(image, dtype=np.float32)
    ink = pixels.min(axis=2) < 240
    if ink.mean() < 0.08:
        return None
    chroma = float((pixels.max(axis=2) - pixels.min(axis=2))[ink].mean())
    if chroma < 10.0 and ink.mean() < 0.35:  # black line art
        return None
    small = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=np.float32)
    centred = small - small.mean()
    norm = float(np.linalg.norm(centred))
    if norm < 16.0:  # one flat colour: no shape to compare or to learn
        return None
    webp = _encode(image)
    vivid = bool(ink.mean() >= 0.15) and chroma >= 20.0 and len(webp) >= 500
    return Sample(candidate=candidate, webp=webp, shape=centred.ravel() / norm, vivid=vivid)


def _choose(samples: list[Sample], limit: int, duplicate: float) -> list[Sample]:
    """Chooses at most `limit` samples, vivid ones first; no two chosen images have a correlation above `duplicate`."""
    order = sorted(samples, key=lambda sample: sample.candidate.name)
    random.Random(0).shuffle(order)
    order.sort(key=lambda sample: not sample.vivid)
    chosen: list[Sample] = []
    for sample in order:
        if len(chosen) == limit:
            break
        if all(float(sample.shape @ other.shape) <= duplicate for other in chosen):
            chosen.append(sample)
    return chosen


def _group(samples: list[Sample], alike: float) -> list[list[Sample]]:
    """Groups samples that belong to the same series, or whose images have a correlation above `alike`.

    Groups are connected components: two samples may be in one group because both are connected with a third.
    """
    parent = list(range(len(samples)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_of: dict[str, int] = {}
    for i, sample in enumerate(samples):
        parent[root(i)] = root(first_of.setdefault(sample.candidate.series, i))
    shapes = np.stack([sample.shape for sample in samples])
    for i, j in zip(*np.nonzero(np.triu(shapes @ shapes.T, k=1) > alike), strict=True):
        parent[root(int(i))] = root(int(j))
    groups: dict[int, list[Sample]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(root(i), []).append(sample)
    return list(groups.values())


def _split(groups: list[list[Sample]], fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Splits groups of samples into training and validation samples. A group is never divided.

    The groups are visited in a fixed shuffled order. A group becomes validation samples if it meets two conditions.
    First, the group has at most four samples. Second, with this group, no category has more validation samples than its
    limit: `fraction` of all samples of the category, rounded to a whole number. All other groups become training
    samples.
    """
    sizes: dict[str, int] = {}
    for sample in (sample for group in groups for sample in group):
        sizes[sample.candidate.category] = sizes.get(sample.candidate.category, 0) + 1
    wanted = {category: round(fraction * size) for category, size in sizes.items()}
    order = sorted(groups, key=lambda group: min(sample.candidate.name for sample in group))
    random.Random(1).shuffle(order)
    train: list[Sample] = []
    validation: list[Sample] = []
    for group in order:
        # A group that crosses categories stays whole: it goes to validation only if all its categories have room.
        parts = [sample.candidate.category for sample in group]
        if len(group) <= 4 and all(parts.count(category) <= wanted[category] for category in parts):
            validation += group
            for category in parts:
                wanted[category] -= 1
        else:
            train += group
    return train, validation


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Writes (name, content) pairs as a tar file without times and owners; equal pairs give equal bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _members(samples: list[Sample], prefix: str, suffix: str, first: int) -> Iterator[tuple[str, bytes]]:
    """Yields the members of a tar file in a fixed shuffled order, with keys numbered from `first`."""
    order = sorted(samples, key=lambda sample: sample.candidate.name)
    random.Random(2).shuffle(order)
    for number, sample in enumerate(order, start=first):
        yield f"{prefix}-{number:06d}.webp", sample.webp
        yield f"{prefix}-{number:06d}.{suffix}", sample.candidate.text.encode("utf-8")


def _write_split(out: Path, kind: str, suffix: str, groups: list[list[Sample]], fraction: float) -> None:
    """Writes `{kind}s-train.tar` and `{kind}s-validation.tar`, with keys numbered across the two files."""
    train, validation = _split(groups, fraction)
    write_shard(out / f"{kind}s-train.tar", _members(train, kind, suffix, 0))
    write_shard(out / f"{kind}s-validation.tar", _members(validation, kind, suffix, len(train)))


def build_pairs(packages: Path, out: Path) -> None:
    """Writes the image-text pairs: `pairs-train.tar` and `pairs-validation.tar`.

    Args:
        packages: folder with the downloaded packages.
        out: folder to write to.
    """
    samples = [sample for sample in map(_process, read_pairs(packages)) if sample]
    # Emoji faces with different meanings differ in few pixels, so the thresholds are high.
    chosen = _choose(samples, NUM_PAIRS, duplicate=0.998)
    _write_split(out, "pair", "txt", _group(chosen, alike=0.965), PAIRS_VALIDATION_FRACTION)


def build_images(packages: Path, out: Path) -> None:
    """Writes the labelled images: `images-train.tar` and `images-validation.tar`.

    Args:
        packages: folder with the downloaded packages.
        out: folder to write to.
    """
    by_category: dict[str, list[Sample]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for sample in map(_process, read_clipart(packages, Path(scratch))):
            if sample:
                by_category.setdefault(sample.candidate.category, []).append(sample)
    chosen = [
        sample
        for samples in by_category.values()
        for sample in _choose(samples, NUM_IMAGES_PER_CATEGORY, duplicate=0.96)
    ]
    _write_split(out, "image", "json", _group(chosen, alike=0.93), IMAGES_VALIDATION_FRACTION)


def _chapters(lines: list[str]) -> list[list[str]]:
    """Splits the lines of a novel into chapters, and returns the paragraphs of each chapter.

    Paragraphs are single lines without emphasis marks. Headings and notes are left out.
    """
    chapters = re.split(r"^chapter +(?:\d+|[ivxlc]+)\s*$", "\n".join(lines), flags=re.IGNORECASE | re.MULTILINE)[1:]
    result = []
    for chapter in chapters:
        blocks = (" ".join(re.sub(r"[_*]", "", block).split()) for block in re.split(r"\n\s*\n", chapter))
        kept = [
            b
            for b in blocks
            if b and not re.match(r"\[|vide a letter|\(end of|(finis|the end|volume \w+)\W*$", b, re.IGNORECASE)
        ]
        result.append(kept)
    return result


def build_text(packages: Path, out: Path) -> None:
    """Writes `text-train.txt` and `text-validation.txt`: one paragraph per line, with blank lines between paragraphs.

    Args:
        packages: folder with the downloaded packages.
        out: folder to write to.
    """
    with tempfile.TemporaryDirectory() as scratch:
        novels = read_novels(packages, Path(scratch))
    chapters = [
        chapter for title, (first, last) in CHAPTERS.items() for chapter in _chapters(novels[title])[first - 1 : last]
    ]
    for name, part in (
        ("train", chapters[:-NUM_VALIDATION_CHAPTERS]),
        ("validation", chapters[-NUM_VALIDATION_CHAPTERS:]),
    ):
        paragraphs = [paragraph for chapter in part for paragraph in chapter]
        (out / f"text-{name}.txt").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8", newline="\n")


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m beit3_ds.sample_data.build",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Rebuild the sample data (image-text pairs, labelled images, prose) from public packages.",
        epilog=(
            "The packages, fetched into the folder given as --packages:\n\n"
            "  apt-get download openclipart-png openclipart-svg r-cran-janeaustenr\n"
            "  npm pack @lobehub/fluent-emoji-3d cldr-annotations-full\n\n"
            "They take 180 MB, and unpacked another 300 MB in the temporary folder for a minute.\n"
            "It needs dpkg-deb, and Pillow with WebP. ATTRIBUTION.md names the versions used."
        ),
    )
    parser.add_argument("--packages", type=Path, required=True, help="folder with the .deb and .tgz files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the six data files into")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Builds all files, and prints the size and SHA-256 of each file."""
    arguments = _parse_arguments(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        for build in (build_text, build_pairs, build_images):
            build(arguments.packages, arguments.out)
    except PackageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    total = 0
    for name in OUTPUTS:
        data = (arguments.out / name).read_bytes()
        total += len(data)
        print(f"{len(data):9d}  {hashlib.sha256(data).hexdigest()}  {name}")
    print(f"{total:9d}  total")
    if total > MAX_TOTAL_BYTES:
        print(
            f"error: sample_data: {total} bytes are more than {MAX_TOTAL_BYTES}; lower NUM_PAIRS.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
