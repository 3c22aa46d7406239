"""Prepares images with their classes, and the names of the classes."""

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
from beit3_ds.data.sources import ConcatSources, check_no_file_twice, image_format
from beit3_ds.tasks.imagenet.classes import ClassList
from beit3_ds.tasks.imagenet.config import ImagenetConfig
from beit3_ds.tasks.imagenet.files import LabelledImages, read_class_folders, read_class_lines, read_class_tars
from beit3_ds.tasks.imagenet.mixing import WHOLE, Mixing
from beit3_ds.tokenizers.text import TextTokenizer

CLASS_LINES = "class_jsonl"
"""Format of JSON lines with the classes of images in a folder."""
CLASS_NAMES = "class_names"
"""Format of a file with a class and its name per line."""
IMAGE_FORMATS = ("tar", "folder", CLASS_LINES)
"""Formats of images with classes (`tasks.imagenet.files`)."""


class ClassText(NamedTuple):
    """Holds the text of a class."""

    label: int
    """Label of the class."""
    ids: NDArray[np.int64]
    """Ids of the text, BOS and EOS included."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassImage:
    """Holds an image with its class, or two mixed images."""

    name: str
    """File and name of the sample, for messages."""
    number: int
    """Number of the sample in its stream."""
    view: Tensor
    """View of the model, (3, image_size, image_size) float32 in [-1, 1]."""
    label: int
    """Label of the image."""
    other_label: int
    """Label of the image that is mixed in; `label` if there is none."""
    share: int
    """Share of the image itself, in units of 1 / `WHOLE`."""
    text: ClassText | None = None
    """Text of the class, in a run whose steps compare only some classes."""


@dataclass(frozen=True, kw_only=True)
class ClassImages:
    """Prepares the images of one source."""

    is_last_open: ClassVar[bool] = False

    source: LabelledImages
    """Images with labels."""
    view: ImageTransform
    """Transform that makes the view of the model."""
    mixing: Mixing | None = None
    """How images are mixed; None mixes none."""
    texts: Sequence[ClassText] | None = None
    """Texts of all classes; each sample also gets the text of its class. None adds no texts."""

    def __len__(self) -> int:
        """Returns the number of images, broken ones included."""
        return len(self.source)

    def files(self) -> Iterable[SourceFile]:
        """Returns the files of the source."""
        return self.source.files()

    def identity(self, index: int) -> bytes:
        """Returns the name of a sample as bytes, to detect renumbered samples."""
        return self.source.name(index).rpartition("/")[2].encode("utf-8", "surrogatepass")

    def name(self, index: int) -> str:
        """Returns the file of a sample and its name there, for messages."""
        return self.source.name(index)

    def skipped(self) -> dict[str, Skipped]:
        """Returns files, members and rows of the source that are no samples, by the reason."""
        return self.source.skipped

    def prepare(self, index: int, key: SampleKey) -> ClassImage:
        """Reads an image and draws its view; mixing reads a second image of the source, drawn by `key` alone.

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
            number=key.index,
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
    """Provides the texts of all classes as samples, one per class."""

    is_last_open: ClassVar[bool] = False

    texts: Sequence[ClassText]
    """Text of every class."""
    classes: ClassList
    """The classes."""

    def __len__(self) -> int:
        """Returns the number of classes."""
        return len(self.texts)

    def files(self) -> Iterable[SourceFile]:
        """Returns the file of the classes."""
        path = self.classes.where
        return [SourceFile(os.path.basename(path), os.path.getsize(path), len(self))]

    def identity(self, index: int) -> bytes:
        """Returns the key of a class as bytes, to detect renumbered classes."""
        return self.classes.classes[index].key.encode("utf-8", "surrogatepass")

    def name(self, index: int) -> str:
        """Returns the file and the key of a class, for messages."""
        return f"{self.classes.where}:{self.classes.classes[index].key}"

    def skipped(self) -> dict[str, Skipped]:
        """Returns nothing, because every line is a class."""
        return {}

    def prepare(self, index: int, key: SampleKey) -> ClassText:
        """Returns the text of a class."""
        return self.texts[index]


def encode_classes(
    classes: ClassList, settings: ImagenetConfig, tokenizer: TextTokenizer, length: int
) -> list[ClassText]:
    """Returns the text of every class, cut to `length` ids, BOS and EOS included.

    Raises:
        ConfigError: if the tokenizer keeps nothing of a name.
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
    """Opens the images of a split; training with the head `names` also reads the names of the classes.

    Args:
        config: the run's configuration.
        settings: the task's settings.
        classes: the classes.
        texts: text of every class; empty for the head `linear`.
        split: the split.

    Raises:
        ConfigError: if a file cannot be read, or an image has a class that is not in the list.
    """
    data, is_training = config.data, split == "train"
    sources = getattr(data.images, split)
    check_no_file_twice([source for source in sources if not source.is_of_task])
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
