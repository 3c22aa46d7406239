"""Opens images with annotated objects, and prepares them for training or evaluation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image
from torch import Tensor

from beit3_ds.config import ConfigError, RunConfig, SourceConfig
from beit3_ds.config.data import Split
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.records import BrokenRecordError, Skipped
from beit3_ds.data.samples import SampleKey, Stream
from beit3_ds.data.sources import ConcatSources, check_no_sample_twice
from beit3_ds.pixels import to_floats
from beit3_ds.tasks.detection.augmentation import LargeScaleJitter, fitted_window
from beit3_ds.tasks.detection.config import DetectionConfig
from beit3_ds.tasks.detection.files import AnnotatedObjects, read_objects
from beit3_ds.tasks.detection.objects import ImageObjects
from beit3_ds.tasks.detection.sampling import draw_seed
from beit3_ds.tasks.detection.views import View

OBJECTS_FORMAT = "coco_objects"
"""Name of the source format for COCO and Objects365 annotation files."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectionSample:
    """Holds one training view of an image and the objects in the view, or all evaluation views of an image."""

    name: str
    """Annotation file, image id and image path, for messages."""
    sample_index: int
    """Index of the image in its split, from 0."""
    pixels: Sequence[Tensor]
    """Pixels of each view, (3, height, width) float32 in [-1, 1]; a training sample has one view."""
    seed: int = 0
    """Seed for sampling anchors and proposals in the head; only for training."""
    objects: ImageObjects | None = None
    """Objects in the view; only for training."""
    views: Sequence[View] = ()
    """Size and flip of each view; only for evaluation. `pack` sets `View.sample`."""


@dataclass(frozen=True, kw_only=True)
class ObjectSamples:
    """Prepares the images of one source for training or evaluation."""

    is_last_open: ClassVar[bool] = False

    source: AnnotatedObjects
    """Images and objects of the source."""
    jitter: LargeScaleJitter | None
    """Augmentation of training images; None prepares evaluation views."""
    settings: DetectionConfig
    """The task's settings."""
    image_size: int
    """Side in pixels of the square into which the views for evaluation are fitted; unused if `settings.test_sizes` is
    set."""

    def __len__(self) -> int:
        """Returns the number of images, including broken images."""
        return len(self.source)

    def files(self) -> Iterable[SourceFile]:
        """Returns the name, size in bytes and number of images of the annotation file."""
        return self.source.files()

    def identity(self, index: int) -> bytes:
        """Returns the image id as bytes; a resumed run recognises images by these bytes."""
        return str(int(self.source.identifiers[index])).encode()

    def name(self, index: int) -> str:
        """Returns the annotation file, the image id and the image path of a sample, for messages."""
        return self.source.name(index)

    def skipped(self) -> dict[str, Skipped]:
        """Returns a count and one example for each kind of problem in the annotation file.

        The kinds are: one for each reason why training leaves out an annotation, one for boxes that exceed their image
        by more than 1 pixel, and one for images with too many pixels.
        """
        return self.source.skipped

    def prepare(self, index: int, key: SampleKey) -> DetectionSample:
        """Reads image `index` and augments it for training, or builds its evaluation views; `key` seeds all random
        draws.

        Raises:
            BrokenRecordError: if the image or a mask is broken, or the image's size differs from the annotation file.
        """
        image = self.source.image(index)
        if self.jitter is None:
            return evaluation_sample(image, self.settings, self.image_size, self.name(index), key.index)
        try:
            pixels, objects = self.jitter(image, self.source.objects(index), key.rng("view"))
        except ValueError as error:
            raise BrokenRecordError(f"{self.name(index)}: broken mask: {error}") from error
        return DetectionSample(
            name=self.name(index), sample_index=key.index, pixels=[pixels], seed=draw_seed(key), objects=objects
        )


def evaluation_sample(
    image: Image.Image, settings: DetectionConfig, image_size: int, name: str, sample_index: int
) -> DetectionSample:
    """Builds the views of an RGB image for an evaluation or a prediction.

    Args:
        image: RGB image.
        settings: the task's settings; `test_sizes` and `test_flip` define the views.
        image_size: side in pixels of the square into which the views are fitted, if `test_sizes` is empty.
        name: name of the image, for messages.
        sample_index: index of the image in the results.
    """
    size = image.size[::-1]
    flips = (False, True) if settings.test_flip else (False,)
    windows = [
        fitted_window(size, side, is_flipped=flip) for side in settings.test_sizes or (image_size,) for flip in flips
    ]
    views = [View(0, window.size, size, window.is_flipped) for window in windows]
    pixels = [to_floats(window.cut(image)[None])[0] for window in windows]
    return DetectionSample(name=name, sample_index=sample_index, pixels=pixels, views=views)


def open_objects(source: SourceConfig, settings: DetectionConfig, *, needs_images: bool = True) -> AnnotatedObjects:
    """Opens a source of images with objects, and checks all entries of the annotation file.

    The annotation file is `source.path`. With `needs_images`, also checks that all images exist.

    Raises:
        ConfigError: if `source` lacks 'images'; if `source` has 'annotations' or 'split', which this format does not
            use; if a file cannot be read, an image is missing, or an entry of the annotation file is invalid. For an
            invalid entry, the message names the annotation file and the entry.
    """
    if not source.images:
        raise ConfigError(
            f"data.images: source '{source.path}' of format {OBJECTS_FORMAT} needs 'images': the folder of its images, "
            "or a pattern of tars."
        )
    if source.annotations or source.split:
        raise ConfigError(
            f"data.images: source '{source.path}' of format {OBJECTS_FORMAT} has all annotations in one file; remove "
            "'annotations' and 'split'."
        )
    opened = read_objects(source.path, source.images, with_masks=settings.masks)
    if needs_images:
        opened.check_images()
    return opened


def open_split(
    config: RunConfig, settings: DetectionConfig, split: Split, *, needs_images: bool = True
) -> list[AnnotatedObjects]:
    """Opens all sources of a split; without `needs_images`, images may be missing.

    Raises:
        ConfigError: if a source is invalid (`open_objects`) or named twice, a training or validation file has no
            annotations, or two sources of a validation or test split share an image id.
    """
    sources = getattr(config.data.images, split)
    check_no_sample_twice(sources)
    opened = [open_objects(source, settings, needs_images=needs_images) for source in sources]
    for source in opened if split != "test" else ():
        if not source.has_annotations:
            raise ConfigError(
                f"detection: {source.path} has no 'annotations', as files of a test split. It can neither be trained "
                "on nor scored: name it under 'test'."
            )
    seen: dict[int, str] = {}
    for source in opened if split != "train" and len(opened) > 1 else ():
        for identifier in source.identifiers.tolist():
            if identifier in seen:
                raise ConfigError(
                    f"detection: {source.path} has image id {identifier}, as has {seen[identifier]}. Ids must differ "
                    f"over all sources of a {split} split, because results name images by them."
                )
            seen[identifier] = source.path
    return opened


def build_stream(
    config: RunConfig, settings: DetectionConfig, opened: Sequence[AnnotatedObjects], split: Split
) -> Stream:
    """Joins the opened sources of a split to one sequence of samples; training images are augmented."""
    jitter = None
    if split == "train":
        jitter = LargeScaleJitter(
            image_size=config.model.image_size,
            min_scale=settings.min_scale,
            max_scale=settings.max_scale,
            flip_probability=config.data.flip_probability,
            color_jitter=config.data.color_jitter,
            with_masks=settings.masks,
        )
    samples = [
        ObjectSamples(source=source, jitter=jitter, settings=settings, image_size=config.model.image_size)
        for source in opened
    ]
    return Stream(ConcatSources(samples), sequences_per_sample=1 if split == "train" else settings.num_views)
