"""Packs images and class names into one micro-batch."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.data.packing import pack_inputs, stack_views
from beit3_ds.tasks.imagenet.head import CLASSES, patch_rows
from beit3_ds.tasks.imagenet.samples import ClassImage, ClassText

OTHER_CLASSES = "other classes"
"""Key in `PackedBatch.targets`: class label of the second image in each mixed image, (images,) int64."""
SHARES = "shares"
"""Key in `PackedBatch.targets`: share of the first image in each mixed image, in units of 1 / `mixing.WHOLE`, (images,)
int64."""
INDICES = "indices"
"""Key in `PackedBatch.targets`: index of each image in its split, (images,) int64."""
TEXT_CLASSES = "classes of texts"
"""Key in `PackedBatch.targets`: class label of each text, (texts,) int64."""

_IMAGES, _TEXTS = 0, 3  # indices into `layout.PARTS`


def pack(
    samples: Sequence[ClassImage | ClassText],
    drop_path: Tensor | None,
    sources: Mapping[str, int],
    *,
    model: ModelConfig,
    head: Literal["names", "linear"],
    embeds: bool,
) -> PackedBatch:
    """Packs all images, then all class texts; there may be no images or no texts.

    Args:
        samples: images, then class texts. An image may also contain the text of its class (`ClassImage.text`).
        drop_path: factors of stochastic depth, (sequences, layers, 2) float32, in the order of `samples`. An image that
            contains a text has two entries: first for the image, then for the text. None without stochastic depth.
        sources: value of `PackedBatch.sources`.
        model: the model's configuration.
        head: head of the task. `linear` reads the patches of each image; `names` reads the first row of each image and
            text.
        embeds: whether the batch contains the pixels; a pipeline stage without the embedding layer needs none.
    """
    images = [sample for sample in samples if isinstance(sample, ClassImage)]
    sequences = [part for sample in samples for part in _sequences(sample)]
    image_places = [place for place, part in enumerate(sequences) if isinstance(part, ClassImage)]
    text_places = [place for place, part in enumerate(sequences) if isinstance(part, ClassText)]
    texts = [part for part in sequences if isinstance(part, ClassText)]
    batch = pack_inputs(
        num_images=len(images),
        pixels=stack_views([image.view for image in images], model.image_size) if embeds else None,
        num_patches=model.num_patches,
        texts=[text.ids for text in texts],
        drop_path=None if drop_path is None else drop_path[[*image_places, *text_places]],
        sample_names=[*(image.name for image in images), *(f"class {text.label}" for text in texts)],
        sources=sources,
    )
    integers = {
        CLASSES: [image.label for image in images],
        OTHER_CLASSES: [image.other_label for image in images],
        SHARES: [image.share for image in images],
        INDICES: [image.sample_index for image in images],
        TEXT_CLASSES: [text.label for text in texts],
    }
    rows = patch_rows(batch.layout) if head == "linear" else batch.layout.first_rows(_IMAGES, _TEXTS)
    return dataclasses.replace(
        batch,
        head_rows=rows.rows,
        head_row_counts=rows.counts,
        term_counts=(len(images), len(images)),
        targets={name: torch.tensor(values, dtype=torch.int64) for name, values in integers.items()},
    )


def _sequences(sample: ClassImage | ClassText) -> Sequence[ClassImage | ClassText]:
    if isinstance(sample, ClassImage) and sample.text is not None:
        return (sample, sample.text)
    return (sample,)
