"""Reads caption files; each entry names an image and lists the image's captions.

| format | file | image of an entry |
|---|---|---|
| `karpathy` | `dataset_coco.json`, `dataset_flickr30k.json` | `filepath` and `filename`, in the folder |
| `coco_images` | nocaps, COCO's `captions_*.json` and `image_info_*.json` | `file_name`, in the folder |
| `caption_lines` | JSON lines: `image`, `captions` or `caption`, optional `id` | value of `image`, in the folder |
"""

import json
from collections import Counter
from typing import Any, Literal

from beit3_ds.config import ConfigError
from beit3_ds.data.files.json_lines import iterate_json_lines
from beit3_ds.data.files.json_lists import iterate_json_list, reading_as
from beit3_ds.data.images.captioned import CaptionedImages

CaptionFormat = Literal["karpathy", "coco_images", "caption_lines"]
"""Format of a caption file; the docstring of this module describes each format."""

_KARPATHY = "an object with 'images' (filename, split, sentences)"
_COCO = "an object with 'images' (id, file_name) and, but for a test split, 'annotations' (image_id, caption)"


def read_captions(
    path: str, folder: str, kind: CaptionFormat, split: str = "", *, needs_captions: bool = True
) -> CaptionedImages:
    """Reads a caption file.

    Args:
        path: path of the caption file.
        folder: folder of the images.
        kind: format of the file, such as `karpathy`.
        split: split of a Karpathy file (`read_karpathy`). Must be empty for the other formats, because their files have
            one split.
        needs_captions: whether every image must have a caption, as training and scoring require.

    Raises:
        ConfigError: if the file cannot be read, has another form or lacks the split, or if an image lacks a required
            caption.
    """
    if kind == "karpathy":
        samples = read_karpathy(path, folder, split)
    elif split:
        raise ConfigError(f"data: {path} of format {kind} has one split, so split='{split}' must be left out.")
    else:
        samples = read_coco_images(path, folder) if kind == "coco_images" else read_caption_lines(path, folder)
    if needs_captions:
        samples.each_image().check_has_references()
    return samples


def read_karpathy(path: str, folder: str, split: str) -> CaptionedImages:
    """Reads one of Karpathy's splits of COCO or Flickr30K (Karpathy and Fei-Fei, 2015, arXiv:1412.2306).

    Args:
        path: JSON file whose list `images` has one object per image. The object has the keys `filename`, `split` and
            `sentences`. The value of `sentences` is a list of objects with a caption under `raw`. COCO's objects also
            have `filepath` and `cocoid`; those of Flickr30K have `imgid`.
        folder: folder of the images; for COCO the parent folder of `train2014` and `val2014`.
        split: `train`, `val`, `test` or `restval`. COCO's `restval` contains the images of `val2014` that are in
            neither `val` nor `test`. `train` includes `restval`, as in all published results.

    Raises:
        ConfigError: if the file cannot be read or has another form, if the split has no image, if an image id occurs
            twice, or if a caption is empty. For a repeated id or an empty caption, the message names the entry.
    """
    wanted = ("train", "restval") if split == "train" else (split,)
    samples, found = CaptionedImages(path, folder), Counter[str]()
    with reading_as(path, _KARPATHY):
        for number, entry in enumerate(iterate_json_list(path, "images")):
            found[entry["split"]] += 1
            if entry["split"] not in wanted:
                continue
            identifier = entry["cocoid"] if "cocoid" in entry else entry["imgid"]
            name = "/".join(filter(None, (entry.get("filepath"), entry["filename"])))
            captions = [sentence["raw"] for sentence in entry["sentences"]]
            samples.add_captioned_image(identifier, name, captions, f"{path}: entry {number} of 'images'")
    if not samples.num_images:
        splits = ", ".join(f"{name} ({count:,} images)" for name, count in sorted(found.items())) or "none"
        raise ConfigError(f"data: {path} has no image of the split '{split}'. Its splits: {splits}.")
    return samples


def read_coco_images(path: str, folder: str) -> CaptionedImages:
    """Reads caption files in COCO's format, such as nocaps (Agrawal et al., 2019, arXiv:1812.08658).

    Args:
        path: JSON object with `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`). A test split has
            no annotations.
        folder: folder that contains the images.

    Raises:
        ConfigError: if the file cannot be read or has another form, if an image occurs twice, if a caption is empty, or
            if a caption belongs to an unlisted image. The message names the entry.
    """
    samples = CaptionedImages(path, folder)
    with reading_as(path, _COCO):
        images = list(iterate_json_list(path, "images"))
        captions: dict[Any, list[str]] = {image["id"]: [] for image in images}
        for number, annotation in enumerate(_annotations(path)):
            if annotation["image_id"] not in captions:
                raise ConfigError(
                    f"data: {path}: entry {number} of 'annotations' describes image {annotation['image_id']!r}, which "
                    "is not in 'images'. Fetch the file again."
                )
            captions[annotation["image_id"]].append(annotation["caption"])
        for number, image in enumerate(images):
            where = f"{path}: entry {number} of 'images'"
            samples.add_captioned_image(image["id"], image["file_name"], captions[image["id"]], where)
    return samples


def _annotations(path: str) -> list[Any]:
    """Returns the annotations of a file in COCO's format; empty for a test split."""
    try:
        return list(iterate_json_list(path, "annotations"))
    except KeyError:
        return []


def read_caption_lines(path: str, folder: str) -> CaptionedImages:
    """Reads images with captions from JSON lines.

    Args:
        path: file with one JSON object per line. `image` is a path in the folder. `captions` is a list of texts.
            Instead of `captions`, a line can have `caption`, which is one text. A test split needs neither. `id` is
            optional and defaults to the value of `image`.
        folder: folder of the images.

    Raises:
        ConfigError: if the file cannot be read, a line does not have this form, an image occurs twice or a caption is
            empty. The message names the line.
    """
    samples = CaptionedImages(path, folder)
    for number, line in iterate_json_lines(path, {"image": str}):
        captions = line.get("captions", [line["caption"]] if "caption" in line else [])
        if not isinstance(captions, list):
            raise ConfigError(
                f"data: {path}:{number}: 'captions' must be a list of texts, not {json.dumps(captions)[:80]}. One text "
                "goes under 'caption'."
            )
        samples.add_captioned_image(line.get("id", line["image"]), line["image"], captions, f"{path}:{number}", number)
    return samples
