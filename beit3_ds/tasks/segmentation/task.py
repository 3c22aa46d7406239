"""Implements the semantic segmentation task (paper section 3.2, table 8)."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from beit3_ds.config import ConfigError, ModelConfig, RunConfig
from beit3_ds.data.samples import Split
from beit3_ds.model import Head, StageModel
from beit3_ds.parallel import TensorParallel
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks.rank_task import Evaluator, RankShare, RankTask
from beit3_ds.tasks.result_page import ShownSample
from beit3_ds.tasks.segmentation.classes import find_names_file, read_class_names
from beit3_ds.tasks.segmentation.config import SegmentationConfig
from beit3_ds.tasks.segmentation.evaluation import picture, segment_split
from beit3_ds.tasks.segmentation.files import FORMATS
from beit3_ds.tasks.segmentation.head import SegmentationHead
from beit3_ds.tasks.segmentation.mask_decoder import mask2former_parts
from beit3_ds.tasks.segmentation.memory import crop_memory
from beit3_ds.tasks.segmentation.model import SegmentationModel
from beit3_ds.tasks.segmentation.packing import pack
from beit3_ds.tasks.segmentation.pictures import draw_labels
from beit3_ds.tasks.segmentation.result_folder import score_folder
from beit3_ds.tasks.segmentation.results import write_results, write_tables
from beit3_ds.tasks.segmentation.samples import LabelledCrop, build_streams, open_split
from beit3_ds.tasks.segmentation.sliding import SlidingWindows
from beit3_ds.tasks.task import Headline, Task, Term


@dataclass(frozen=True, kw_only=True)
class SegmentationRankTask(RankTask):
    """Runs semantic segmentation on one rank; holds the opened images."""

    windows: SlidingWindows
    """Cuts images into windows, and merges the windows' class scores."""
    patch_size: int
    """Side of a patch in pixels."""
    names: Sequence[str]
    """Name of each class."""

    def evaluate(self, evaluator: Evaluator, split: Split, folder: ResultFolder | None) -> dict[str, float]:
        """Segments all images of a split by sliding windows.

        With `folder`, also writes a result page, label maps and, for a split with labels, a class table and a picture
        of the confusion matrix.

        Returns:
            `mIoU`, `mean_accuracy`, `pixel_accuracy` and `images` (number of images) on the main rank. Empty on other
            ranks, and for a split without labels.
        """
        result = segment_split(
            evaluator, split, self.windows, self.patch_size, self.evaluation, with_files=folder is not None
        )
        if result is None or not result.num_images:
            return {}
        metrics = result.confusion.metrics()
        if metrics:
            metrics["images"] = float(result.num_images)
        if folder is not None:
            write_results(result, metrics, self.evaluation[split].streams["images"], self.names, folder)
        return metrics

    def draw_sample(self, sample: Any) -> ShownSample | None:
        """Makes two pictures of a training crop: the crop itself, and its labels drawn over it in colours, with a
        legend.

        In the second picture, pixels without a label are darkened. Returns None if `sample` is not a training crop.
        """
        if not isinstance(sample, LabelledCrop):
            return None
        whole = picture(((sample.view + 1) * 127.5).round().to(torch.uint8))
        return ShownSample(
            images=[whole, draw_labels(whole, sample.labels, self.names)],
            title=sample.name,
            lines={"pictures": "crop, and its labels with their legend"},
        )


class Segmentation(Task):
    """Defines semantic segmentation with a ViT-Adapter and Mask2Former (ADE20K; paper section 3.2).

    The query decoder predicts masks and classes before its first layer and after each layer. For each of these
    predictions, the class term is a weighted mean over all queries of a step, and the mask terms are means over all
    target masks of a step. Each term is the sum of its values for all predictions.
    """

    Settings = SegmentationConfig
    settings: SegmentationConfig
    has_validation_loss: ClassVar[bool] = False
    formats: ClassVar[Mapping[str, Sequence[str]]] = {"images": FORMATS}
    headline: ClassVar[Headline] = Headline("mIoU")

    def __init__(self, config: RunConfig) -> None:
        """Loads the settings, and checks the model and the layout of ranks.

        Raises:
            ConfigError: if there are several pipeline stages; if `model.dense` is missing; if `model.final_norm`,
                `model.image_size` or the adapter does not fit; or if transformers or scipy is not installed.
        """
        super().__init__(config)
        _check_layout(config)
        _check_model(config.model, self.settings)
        mask2former_parts()

    @property
    def terms(self) -> tuple[Term, ...]:
        """Returns the three loss terms of Mask2Former: classes, masks and dice."""
        settings = self.settings
        return (
            Term("classes", "images", "queries: class", settings.class_weight, "cross entropy, all layers (nats)"),
            Term("masks", "images", "masks: pixels", settings.mask_weight, "binary cross entropy, all layers (nats)"),
            Term("dice", "images", "masks: overlap", settings.dice_weight, "dice loss, all layers"),
        )

    def build_head(self, model: ModelConfig, tensor: TensorParallel) -> Head:
        """Builds the adapter or the pyramid, and the decoders, with uninitialised parameters."""
        return SegmentationHead(model, tensor, self.settings, self.config.training.activation_checkpointing)

    def build_model(self, tensor: TensorParallel | None = None, layers: Sequence[range] | None = None) -> StageModel:
        """Builds all layers of the model, uninitialised; `layers` must be None or contain all layers."""
        training = self.config.training
        return SegmentationModel(
            self.build_head,
            self.config.model,
            tensor,
            layers,
            training.activation_checkpointing,
            fp32_residual_connection=training.fp32_residual_connection,
        )

    def head_memory(self, num_images: int, element_size: int) -> int:
        """Returns the bytes of head activations that autograd keeps on one rank per micro-batch.

        Args:
            num_images: number of crops in the micro-batch, before tensor-parallel ranks divide the crops.
            element_size: bytes per element of an activation.
        """
        own = -(-num_images // self.config.parallel.tensor_parallel_size)
        recomputes = self.config.training.activation_checkpointing == "full"
        return own * crop_memory(self.config.model, self.settings, element_size, recomputes=recomputes)

    def describe(self) -> dict[str, Any]:
        """Returns the task's name, its settings and the class names, for storing in checkpoints."""
        return {**super().describe(), "names": list(self.names)}

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Returns the class names; the first call reads the names from a file (`read_class_names`).

        Raises:
            ConfigError: if the file cannot be read, or does not have `task.num_classes` names.
        """
        return read_class_names(self.config, self.settings.class_names, self.settings.num_classes)

    def open(self, share: RankShare) -> SegmentationRankTask:
        """Opens the images that a rank reads.

        Raises:
            ConfigError: if a folder cannot be read, if label maps are missing, if an image or label map has a wrong
                size, or if the weights were trained for other classes.
        """
        config, settings = self.config, self.settings
        self._check_weights()
        adapter = settings.adapter
        num_extractors = 0 if adapter is None else adapter.num_interactions + adapter.num_extra_extractors
        return SegmentationRankTask.open(
            self,
            share,
            functools.partial(build_streams, config, settings, num_extractors),
            functools.partial(pack, model=config.model, num_queries=settings.decoder.num_queries),
            files={"task.class_names": find_names_file(config, settings.class_names) or None},
            windows=SlidingWindows(settings, config.model.image_size),
            patch_size=config.model.patch_size,
            names=self.names,
        )

    def score_results(self, paths: Sequence[str], split: Split, folder: ResultFolder) -> dict[str, float]:
        """Scores a folder of predicted label maps, and writes the class table and the picture of the confusion matrix.

        Args:
            paths: the folder of the predictions, as the only element (`result_folder.score_folder`).
            split: split with the true label maps; its images are listed but not decoded.
            folder: folder to write to.

        Raises:
            ConfigError: if `paths` has several elements or none; if the folder of the predictions cannot be read or
                does not match the split's images; if a prediction or a true label map is invalid; or if the split has
                no label maps.
        """
        if len(paths) != 1:
            raise ConfigError(f"--results: segmentation scores one folder of label maps, but {len(paths)} are named.")
        sources = open_split(self.config, self.settings, split)
        confusion = score_folder(paths[0], sources, self.settings.num_classes)
        metrics = confusion.metrics()
        if not metrics:
            raise ConfigError(f"results: {split} has no labels, so nothing can be scored. Choose another --split.")
        write_tables(confusion, self.names, folder)
        return metrics | {"images": float(sum(source.num_labelled for source in sources))}

    def _check_weights(self) -> None:
        stored = (self.weights_description or {}).get("names")
        if stored is not None and list(stored) != list(self.names):
            raise ConfigError(
                f"segmentation: {self.weights_name} were trained for {len(stored)} classes with other names or in "
                f"another order than this run's {len(self.names)}. Name their file in task.class_names, or start from "
                "weights without this head (`beit3 export WEIGHTS OUT.safetensors --no-heads`)."
            )


TASK = Segmentation


def _check_layout(config: RunConfig) -> None:
    if config.parallel.pipeline_parallel_size > 1:
        raise ConfigError(
            f"parallel.pipeline_parallel_size={config.parallel.pipeline_parallel_size}: the task {config.task.name} "
            "does not support pipelines. The adapter changes rows between blocks and keeps maps of the image, which "
            "stages would have to exchange. Set pipeline_parallel_size to 1; tensor parallelism and every ZeRO stage "
            "work."
        )


def _check_model(model: ModelConfig, settings: SegmentationConfig) -> None:
    if model.dense is None:
        raise ConfigError(
            'segmentation: the model needs a section "dense", because its images have any size. Add "dense": {} for '
            "global attention in all blocks (docs/dense.md)."
        )
    if settings.adapter is not None:
        settings.adapter.check(model.hidden_size, model.num_layers)
        if model.final_norm:
            raise ConfigError(
                "model.final_norm=true, but the adapter takes the rows before the final norm, which would get no "
                "gradient. Set model.final_norm to false; weights with a final norm can still be loaded."
            )
    if model.image_size % 32:
        raise ConfigError(
            f"model.image_size={model.image_size} is not divisible by 32. It is the side of crops, and the coarsest "
            "feature map has stride 32. Use a multiple of 32."
        )
