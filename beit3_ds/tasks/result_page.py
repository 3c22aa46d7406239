"""Writes HTML pages with a model's answers; samples with wrong answers come first."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from beit3_ds.atomic_file import atomic_write

_LONGEST_SIDE = 256
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:76em;margin:2em auto;padding:0 1em}
img{max-height:160px;margin-right:8px;border:1px solid #ccc}
.sample{margin:.8em 0;padding:.6em;border-left:6px solid #bbb}
.right{border-color:#3a9d4a;background:#f1faf2}.wrong{border-color:#c94040;background:#fdf3f3}
dl{display:grid;grid-template-columns:max-content auto;gap:0 1em;margin:.3em 0}dt{color:#666}dd{margin:0}
table{border-collapse:collapse}td{padding:0 1.5em 0 0}"""


@dataclass(frozen=True, kw_only=True)
class ShownSample:
    """Holds the images and texts that a result page shows for one sample."""

    images: Sequence[Image.Image]
    """Images of the sample, from left to right."""
    title: str
    """Question, statement or name of the sample."""
    lines: Mapping[str, str]
    """Texts to show below the title, by label, such as the model's answer with the label `model`."""
    is_right: bool | None = None
    """Whether the model's answer is right; None if unknown."""


def write_result_page(
    path: Path, title: str, metrics: Mapping[str, float], samples: Iterable[ShownSample], note: str = ""
) -> None:
    """Writes one self-contained HTML page of samples; samples with wrong answers come first.

    Args:
        path: .html file to write.
        title: heading of the page.
        metrics: metrics of the whole split, by name.
        samples: samples to show. Embedded images are scaled down to at most 256 pixels per side.
        note: sentence under the heading.
    """
    ordered = sorted(samples, key=lambda sample: sample.is_right is not False)
    rows = "".join(f"<tr><td>{html.escape(name)}<td>{value:.4g}" for name, value in metrics.items())
    body = f"<h1>{html.escape(title)}</h1><p>{html.escape(note)}</p><table>{rows}</table>"
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    with atomic_write(path) as file:
        file.write((page + body + "".join(map(_section, ordered))).encode())


def _section(sample: ShownSample) -> str:
    kind = {True: " right", False: " wrong", None: ""}[sample.is_right]
    pictures = "".join(f"<img src='{_embed(image)}' alt=''>" for image in sample.images)
    lines = "".join(f"<dt>{html.escape(name)}<dd>{html.escape(text)}" for name, text in sample.lines.items())
    return f'<div class="sample{kind}">{pictures}<p><b>{html.escape(sample.title)}</b></p><dl>{lines}</dl></div>'


def _embed(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def choose_shown(is_right: Sequence[bool | None], count: int) -> list[int]:
    """Returns the indices of `count` samples to show, evenly spread over the split, in ascending order.

    Half of the chosen samples have wrong answers, and half have right or unknown answers. If there are too few samples
    for one half, the other half has more.

    Args:
        is_right: whether the answer to each sample is right; None if unknown.
        count: number of samples to choose; all samples are chosen if there are fewer.
    """
    wrong = [place for place, right in enumerate(is_right) if right is False]
    other = [place for place, right in enumerate(is_right) if right is not False]
    num_wrong = min(len(wrong), max(count // 2, count - len(other)))
    return sorted(_spread(wrong, num_wrong) + _spread(other, min(len(other), count - num_wrong)))


def _spread(places: Sequence[int], count: int) -> list[int]:
    return [places[number * len(places) // count] for number in range(count)]
