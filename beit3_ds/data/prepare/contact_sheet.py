"""Draws an overview picture of a run's images and captions."""

import textwrap
from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont, ImageOps

from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.images.source import ImageSource
from beit3_ds.data.sources import spread

_COLUMNS = 6
_SIDE, _MARGIN = 180, 8  # pixels
_FONT_SIZE, _LINE_HEIGHT, _LINE_LENGTH, _NUM_LINES = 12, 15, 30, 4


def draw_contact_sheet(sources: Mapping[str, ImageSource], samples_per_source: int = 24) -> Image.Image:
    """Draws evenly spread samples of each source with their captions, as an RGB image of 1136 pixels width.

    A sample without a readable caption shows its name instead. A broken image shows the error message.
    """
    rows = [-(-min(len(source), samples_per_source) // _COLUMNS) for source in sources.values()]
    cell_height = _SIDE + _NUM_LINES * _LINE_HEIGHT + _MARGIN
    title_height = 2 * _LINE_HEIGHT
    height = sum(title_height + count * cell_height for count in rows) + _MARGIN
    sheet = Image.new("RGB", (_COLUMNS * (_SIDE + _MARGIN) + _MARGIN, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    top = _MARGIN
    for (title, source), num_rows in zip(sources.items(), rows, strict=True):
        draw.text((_MARGIN, top), f"{title}: {len(source):,} samples", "black", font)
        for place, index in enumerate(spread(len(source), samples_per_source)):
            row, column = divmod(place, _COLUMNS)
            left, upper = _MARGIN + column * (_SIDE + _MARGIN), top + title_height + row * cell_height
            image, text = _sample(source, index)
            sheet.paste(image, (left, upper))
            draw.multiline_text((left, upper + _SIDE), text, "black", font, spacing=_LINE_HEIGHT - _FONT_SIZE)
        top += title_height + num_rows * cell_height
    return sheet


def _sample(source: ImageSource, index: int) -> tuple[Image.Image, str]:
    try:
        image = ImageOps.pad(source.image(index), (_SIDE, _SIDE), color="lightgrey")
    except BrokenRecordError as error:
        return Image.new("RGB", (_SIDE, _SIDE), "mistyrose"), _wrap(str(error)[-_NUM_LINES * _LINE_LENGTH :])
    try:
        return image, _wrap(source.caption(index))
    except BrokenRecordError:
        return image, _wrap(source.name(index)[-_NUM_LINES * _LINE_LENGTH :])


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _LINE_LENGTH, max_lines=_NUM_LINES, placeholder=" ..."))
