"""Opens the files of captioning: Karpathy's splits of COCO, nocaps, and captions of one's own."""

from typing import Literal

from beit3_ds.config import ConfigError
from beit3_ds.data.images.caption_files import read_caption_lines, read_coco_images, read_karpathy
from beit3_ds.data.images.captioned import CaptionedImages

CaptionFormat = Literal["karpathy", "coco_images", "caption_lines"]
"""Formats of files with captions (`data/images/caption_files.py`)."""


def open_captions(path: str, folder: str, kind: CaptionFormat, split: str, *, with_captions: bool) -> CaptionedImages:
    """Opens a file of images with captions.

    Args:
        path: the file.
        folder: folder of the images.
        kind: format of the file.
        split: `train`, `val` or `test` of a Karpathy file; must be empty for the others, which have one split.
        with_captions: whether every image must have a caption, to train on or to score.

    Raises:
        ConfigError: if the file cannot be read, does not have this form, lacks the split, or lacks captions.
    """
    if kind == "karpathy":
        samples = read_karpathy(path, folder, split)
    elif split:
        raise ConfigError(f"captioning: {path} of format {kind} has one split, so split='{split}' must be left out.")
    else:
        samples = read_coco_images(path, folder) if kind == "coco_images" else read_caption_lines(path, folder)
    if with_captions:
        samples.each_image().check_has_references()
    return samples
