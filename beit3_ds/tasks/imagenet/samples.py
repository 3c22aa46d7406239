"""Prepares images with class labels, and the texts of the classes."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from beit3_ds.config import ConfigError, RunConfig, SourceConfig
from beit3_ds.data.files.descriptors import OpenFiles
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.records import Skipped
from beit3_ds.data.images.one_view import ImageTransform, ResizedView, build_train_view
from beit3_ds.data.samples import SampleKey, Split, Stream
from beit3_ds.data.sources import ConcatSources, check_no_sample_twice, image_format
from beit3_ds.tasks.imagenet.classes import ClassList
from beit3_ds.tasks.imagenet.config import ImagenetConfig
from beit3_ds.tasks.imagenet.files import LabelledImages, read_class_folders, read_class_lines, read_class_tars
from beit3_ds.tasks.imagenet.mixing import WHOLE, Mixing
from beit3_ds.tokenizers.text import TextTokenizer

CLASS_LINES = "class_jsonl"
"""Name of the source format for JSON lines with images and their classes."""
CLASS_NAMES = "class_names"
"""Name of the source format for a text file of classes; each line has the key and the name of a class."""
IMAGE_FORMATS = ("tar", "folder", CLASS_LINES)
"""Names of the source formats for images with class labels (`tasks.imagenet.files`)."""


class ClassText(NamedTuple):
    """Holds the tokenized text of a class."""

    label: int
    """Class label of the text."""
    ids: NDArray[np.int64]
    """Token ids of the text, with BOS and EOS, (tokens,)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassImage:
    """Holds an image with its class label, or a mixture of two images with two class labels."""

    name: str
    """File of the sample and the sample's name in the file, for messages."""
    sample_index: int
    """Index of the sample in its split, from 0."""
    view: Tensor
    """Pixels after augmentation or resizing, and after mixing, (3, image_size, image_size) float32 in [-1, 1]."""
    label: int
    """Class label of the image, or of the first image in a mixture."""
    other_label: int
    """Class label of the second image of a mixture; equal to `label` without mixing."""
    share: int
    """Share of the first image in a mixture, in units of 1 / `WHOLE`; `WHOLE` without mixing."""
    text: ClassText | None = None
    """Text of the image's class if a training step compares only some of the classes; otherwise None."""


@dataclass(frozen=True, kw_only=True)
class ClassImages:
    """Prepares the images of one source with their class labels."""

    is_last_open: ClassVar[bool] = False

    source: LabelledImages
    """Images and labels of the source."""
    view: ImageTransform
    """Augments or resizes an image to the model's image size."""
    mixing: Mixing | None = None
    """Mixes images by mixup or CutMix; None mixes no images."""
    texts: Sequence[ClassText] | None = None
    """Texts of all classes, by label; each sample includes the text of its class. With None, samples include no text.
    """

    def __len__(self) -> int:
        """Returns the number of images, including broken images."""
        return len(self.source)

    def files(self) -> Iterable[SourceFile]:
        """Returns each source file's name, size in bytes and number of samples."""
        return self.source.files()

    def identity(self, index: int) -> bytes:
        """Returns the sample's name without folders, as bytes; a resumed run recognises samples by these bytes."""
        return self.source.name(index).rpartition("/")[2].encode("utf-8", "surrogatepass")

    def name(self, index: int) -> str:
        """Returns the sample's file and the sample's name in the file, for messages."""
        return self.source.name(index)

    def skipped(self) -> dict[str, Skipped]:
        """Returns the number of skipped files, members and rows for each reason, with an example."""
        return self.source.skipped

    def prepare(self, index: int, key: SampleKey) -> ClassImage:
        """Reads and augments image `index` of the source, and may mix it with a second image of the source.

        `key` seeds the augmentation, the choice of the second image, and the mixing.

        Raises:
            BrokenRecordError: if an image cannot be read.
        """
        view, label = self._view(index, key, "view"), self.source.label(index)
        other_label, share, rng = label, WHOLE, key.rng("mix")
        if self.mixing is not None and self.mixing.applies(rng):
            other = int(rng.integers(len(self.source)))
            view, share = self.mixing(view, self._view(other, key, "view of the other image"), rng)
            other_label = self.source.label(other)
        text = None if self.texts is None else self.texts[label]
        return ClassImage(
            name=self.name(index),
            sample_index=key.index,
            view=view,
            label=label,
            other_label=other_label,
            share=share,
            text=text,
        )

    def _view(self, index: int, key: SampleKey, purpose: str) -> Tensor:
        return self.view(self.source.image(index, self.view.min_side), key.rng(purpose))


@dataclass(frozen=True, kw_only=True)
class ClassTexts:
    """Provides the class texts as samples, one sample per class."""

    is_last_open: ClassVar[bool] = False

    texts: Sequence[ClassText]
    """Texts of all classes, in the order of the labels."""
    classes: ClassList
    """Keys and names of the classes."""

    def __len__(self) -> int:
        """Returns the number of classes."""
        return len(self.texts)

    def files(self) -> Iterable[SourceFile]:
        """Returns the name, size in bytes and number of classes of the class file."""
        path = self.classes.where
        return [SourceFile(os.path.basename(path), os.path.getsize(path), len(self))]

    def identity(self, index: int) -> bytes:
        """Returns the class key as bytes; a resumed run recognises classes by these bytes."""
        return self.classes.classes[index].key.encode("utf-8", "surrogatepass")

    def name(self, index: int) -> str:
        """Returns the class file and the class key, for messages."""
        return f"{self.classes.where}:{self.classes.classes[index].key}"

    def skipped(self) -> dict[str, Skipped]:
        """Returns an empty dictionary, because no line of the class file is skipped."""
        return {}

    def prepare(self, index: int, key: SampleKey) -> ClassText:
        """Returns the text of the class with label `index`; `key` has no effect."""
        return self.texts[index]


def encode_classes(
    classes: ClassList, settings: ImagenetConfig, tokenizer: TextTokenizer, length: int
) -> list[ClassText]:
    """Tokenizes the text of every class, and cuts each text to `length` tokens, including BOS and EOS.

    Raises:
        ConfigError: if a class name has no tokens.
    """
    texts = []
    for label, found in enumerate(classes):
        pieces = tokenizer.encode(settings.text_of(found.name))[: length - 2]
        if not pieces:
            raise ConfigError(
                f"imagenet: {classes.where}: the tokenizer keeps nothing of the name {found.name[:80]!r} of class "
                f"{found.key!r}. Write a name in the tokenizer's language."
            )
        texts.append(ClassText(label, np.array([tokenizer.bos_id, *pieces, tokenizer.eos_id], dtype=np.int64)))
    return texts


def build_streams(
    config: RunConfig,
    settings: ImagenetConfig,
    classes: ClassList,
    texts: Sequence[ClassText],
    split: Split,
) -> dict[str, Stream]:
    """Opens the images of a split; for training with the head `names`, also the class texts.

    Args:
        config: the run's configuration.
        settings: the task's settings.
        classes: the list of classes.
        texts: texts of all classes; empty with the head `linear`.
        split: name of the split.

    Returns:
        The images under "images"; for training with the head `names`, also the class texts under "texts".

    Raises:
        ConfigError: if a file cannot be read, or the class of an image is unknown.
    """
    data, is_training = config.data, split == "train"
    sources = getattr(data.images, split)
    check_no_sample_twice([source for source in sources if not source.has_task_format])
    files = OpenFiles(data.max_open_files)
    view: ImageTransform = ResizedView(image_size=config.model.image_size)
    mixing = None
    if is_training:
        view = build_train_view(config, data.flip_probability)
        if settings.is_mixing:
            strengths = {"mixup": settings.mixup, "cutmix": settings.cutmix}
            mixing = Mixing(**strengths, probability=settings.mixing_probability)
    own = texts if is_training and 0 < data.texts.samples_per_step < len(classes) else None
    images = [
        ClassImages(source=_open(source, classes, data.cache_dir, files), view=view, mixing=mixing, texts=own)
        for source in sources
    ]
    streams = {"images": Stream(ConcatSources(images), sequences_per_sample=1 if own is None else 2)} if images else {}
    if is_training and texts and data.texts.samples_per_step:
        streams["texts"] = Stream(ConcatSources([ClassTexts(texts=texts, classes=classes)]))
    return streams


def _open(source: SourceConfig, classes: ClassList, cache_dir: str | None, files: OpenFiles) -> LabelledImages:
    match image_format(source):
        case "folder":
            return read_class_folders(source.path, classes)
        case "tar":
            return read_class_tars(source.path, classes, cache_dir, files)
        case kind:
            assert kind == CLASS_LINES, f"no reader for the format {kind}"
            return read_class_lines(source.path, source.images, classes)
