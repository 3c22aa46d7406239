"""Implements the task of object detection and instance segmentation (paper section 3.2)."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from beit3_ds.config import ConfigError, ModelConfig, RunConfig
from beit3_ds.config.data import Split
from beit3_ds.data.samples import Stream
from beit3_ds.parallel import TensorParallel
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks.detection.categories import Categories, check_same, stored_categories
from beit3_ds.tasks.detection.config import DetectionConfig
from beit3_ds.tasks.detection.evaluation import (
    CLASSES,
    PAGE,
    DetectedSplit,
    collect_metrics,
    detect_split,
    draw_training_sample,
    read_truth,
    write_classes,
    write_files,
    write_page,
)
from beit3_ds.tasks.detection.files import AnnotatedObjects
from beit3_ds.tasks.detection.flops import image_flops
from beit3_ds.tasks.detection.head import DetectionHead
from beit3_ds.tasks.detection.memory import image_memory
from beit3_ds.tasks.detection.packing import pack
from beit3_ds.tasks.detection.result_files import read_result_files
from beit3_ds.tasks.detection.samples import OBJECTS_FORMAT, DetectionSample, build_stream, open_split
from beit3_ds.tasks.detection.score import average_precision
from beit3_ds.tasks.detection.segmentations import import_masks
from beit3_ds.tasks.rank_task import Evaluator, RankShare, RankTask
from beit3_ds.tasks.result_page import ShownSample
from beit3_ds.tasks.task import Headline, Task, Term


@dataclass(frozen=True, kw_only=True)
class DetectionRankTask(RankTask):
    """Runs object detection on one rank; holds the opened images."""

    settings: DetectionConfig
    """The task's settings."""
    names: Sequence[str] = ()
    """Category names by label; empty on ranks that read no images."""

    def draw_sample(self, sample: DetectionSample) -> ShownSample:
        """Makes a picture of a training image with the boxes and masks of its objects, as the loss sees them."""
        return draw_training_sample(sample, self.names)

    def evaluate(self, evaluator: Evaluator, split: Split, folder: ResultFolder | None) -> dict[str, float]:
        """Detects the objects in all images of a split; returns COCO's metrics, or no metrics without annotations.

        With `folder`, also writes result files in COCO's format, a table of metrics per category, and an HTML page.
        """
        results = detect_split(evaluator, split)
        if results is None or not len(results):
            return {}
        detected = DetectedSplit(self.evaluation[split], results, self.settings)
        scores = detected.scores()
        if folder is not None:
            write_files(detected, scores, folder)
            folder.write(PAGE, lambda path: write_page(path, detected, scores, self.settings.page_samples))
        return collect_metrics(scores)


class Detection(Task):
    """Defines object detection and instance segmentation (COCO and Objects365; paper section 3.2)."""

    Settings = DetectionConfig
    settings: DetectionConfig
    has_validation_loss: ClassVar[bool] = False
    formats: ClassVar[Mapping[str, Sequence[str]]] = {"images": (OBJECTS_FORMAT,)}
    headline: ClassVar[Headline] = Headline("box_AP")

    def __init__(self, config: RunConfig) -> None:
        """Loads the settings, and checks that the model accepts images of any size.

        Raises:
            ConfigError: if `model.dense` is missing, or faster-coco-eval is not installed.
        """
        super().__init__(config)
        import_masks()
        if config.model.dense is None:
            raise ConfigError(
                "model.dense is not set, but detection needs a backbone for images of any size. Add it, such as "
                '"dense": {"window_size": 14, "global_blocks": [2, 5, 8, 11]} (docs/dense.md).'
            )
        self._categories: Categories | None = None

    @property
    def terms(self) -> tuple[Term, ...]:
        """Returns the loss terms; each is a mean over images.

        Two terms belong to the proposal network and two to the box stages. If masks are trained, the mask head has one
        term.
        """
        terms = (
            Term("objectness", "images", "anchors: object or not", unit="cross entropy per drawn anchor (nats)"),
            Term("anchors", "images", "anchors: boxes", unit="L1 per drawn anchor"),
            Term("classes", "images", "boxes: classes", unit="cross entropy per drawn box, of three stages (nats)"),
            Term("boxes", "images", "boxes: corners", unit="L1 per drawn box, of three stages"),
        )
        masks = Term("masks", "images", "masks", unit="binary cross entropy (nats)")
        return (*terms, masks) if self.settings.masks else terms

    def build_head(self, model: ModelConfig, tensor: TensorParallel) -> DetectionHead:
        """Builds the pyramid, the proposal network, the box stages and, if masks are trained, the mask head.

        The parameters are uninitialised.
        """
        return DetectionHead(model, self.settings, self.settings.num_classes, tensor)

    def head_flops(self, term_counts: Sequence[float]) -> float:
        """Returns the floating-point operations of the head's forward pass; a multiply-add counts as 2.

        Images have `model.image_size` pixels per side.

        Args:
            term_counts: one number per loss term; only the first, the number of images, is used.
        """
        return term_counts[0] * image_flops(self.config.model, self.settings)

    def expected_head_flops(self) -> float:
        """Returns the floating-point operations of the head per step, forward and backward."""
        return 3 * self.head_flops((self.config.data.images.samples_per_step,))

    def head_memory(self, num_images: int, element_size: int) -> int:
        """Returns the bytes of head activations that autograd keeps on one rank per micro-batch.

        Args:
            num_images: number of images in the micro-batch, before tensor-parallel ranks divide the images. Images have
                `model.image_size` pixels per side.
            element_size: bytes per element of an activation.
        """
        own = -(-num_images // self.config.parallel.tensor_parallel_size)
        return own * image_memory(self.config.model, self.settings, element_size)

    def describe(self) -> dict[str, Any]:
        """Returns the task's name and settings and, after `open`, the categories."""
        categories = {} if self._categories is None else {"categories": self._categories.describe()}
        return super().describe() | categories

    def open(self, share: RankShare) -> DetectionRankTask:
        """Opens the images and objects that a rank reads.

        Raises:
            ConfigError: if a file cannot be read, if an image is missing, if two files have different categories, if
                the weights were trained for other categories, or if the number of categories is not `task.num_classes`.
        """
        config, settings = self.config, self.settings
        if not share.reads:
            return DetectionRankTask(settings=settings)
        opened = {split: open_split(config, settings, split) for split in share.splits}
        self._categories = self._check_categories([source for split in opened.values() for source in split])

        def build_streams(split: Split) -> dict[str, Stream]:
            sources = opened[split]
            return {"images": build_stream(config, settings, sources, split)} if sources else {}

        return DetectionRankTask.open(
            self,
            share,
            build_streams,
            functools.partial(
                pack,
                model=config.model,
                num_terms=len(self.terms),
                embeds=share.embeds,
            ),
            settings=settings,
            names=() if self._categories is None else self._categories.names,
        )

    def score_results(self, paths: Sequence[str], split: Split, folder: ResultFolder) -> dict[str, float]:
        """Computes COCO's metrics of result files in COCO's format, and writes the table of metrics per category.

        Args:
            paths: a file with boxes, a file with masks, or both (`result_files.read_result_files`).
            split: the split with the annotations; its images are not read.
            folder: folder of the table.

        Raises:
            ConfigError: if a file or an entry is invalid, or the split has no annotations.
        """
        opened = open_split(self.config, self.settings, split, needs_images=False)
        categories = self._check_categories(opened)
        if categories is None or not all(source.has_annotations for source in opened):
            raise ConfigError(f"results: {split} has no annotations, so nothing can be scored. Choose another --split.")
        sizes = {
            identifier: source.size(index)
            for source in opened
            for index, identifier in enumerate(source.identifiers.tolist())
        }
        entries = read_result_files(paths, sizes, categories)
        images, annotations = read_truth(opened, sizes.keys())
        limit = max(100, self.settings.max_detections)
        scores = {
            kind: average_precision(images, annotations, categories, found, kind, limit)
            for kind, found in entries.items()
        }
        folder.write(CLASSES, lambda path: write_classes(path, scores))
        return collect_metrics(scores)

    def _check_categories(self, opened: Sequence[AnnotatedObjects]) -> Categories | None:
        """Checks that all files and the weights have equal categories, and returns these; None if there are no files.

        Raises:
            ConfigError: if categories differ, or their number is not `task.num_classes`.
        """
        if not opened:
            return None
        first = opened[0].categories
        for source in opened[1:]:
            check_same(first, source.categories)
        if len(first) != self.settings.num_classes:
            raise ConfigError(
                f"task.num_classes={self.settings.num_classes}, but {first.where} lists {len(first)} categories. Set "
                f"it to {len(first)}, or use the files that the model was made for."
            )
        stored = stored_categories(self.weights_description, self.weights_name)
        if stored is not None:
            check_same(first, stored)
        return first


TASK = Detection
