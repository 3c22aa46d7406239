"""Implements the ImageNet task: classifies images by class names (paper section 3.2) or with a linear layer."""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from beit3_ds.atomic_file import atomic_write
from beit3_ds.batch import PackedBatch
from beit3_ds.config import ConfigError, ModelConfig, RunConfig
from beit3_ds.data.samples import Split, Stream
from beit3_ds.model import Head, StepLoss
from beit3_ds.parallel import TensorParallel
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks.imagenet.classes import ClassList
from beit3_ds.tasks.imagenet.config import ImagenetConfig
from beit3_ds.tasks.imagenet.head import LinearClassHead
from beit3_ds.tasks.imagenet.loss import class_terms
from beit3_ds.tasks.imagenet.packing import pack
from beit3_ds.tasks.imagenet.samples import CLASS_NAMES, IMAGE_FORMATS, ClassText, build_streams, encode_classes
from beit3_ds.tasks.imagenet.scores import ClassScores, score_split, share_of_batches
from beit3_ds.tasks.rank_task import Evaluator, RankShare, RankTask
from beit3_ds.tasks.result_page import ShownSample, choose_shown, write_result_page
from beit3_ds.tasks.retrieval.head import ContrastiveHead
from beit3_ds.tasks.task import Headline, Task, Term
from beit3_ds.tokenizers.text import load_text_tokenizer

_NUM_ON_PAGE = 60


@dataclass(frozen=True, kw_only=True)
class ImagenetRankTask(RankTask):
    """Runs image classification on one rank; holds the opened images and the class texts."""

    classes: ClassList
    """Keys and names of the classes."""
    texts: Sequence[ClassText]
    """Texts of all classes; empty with the head `linear`."""
    text_batches: Sequence[PackedBatch]
    """Batches of class texts that this rank encodes in an evaluation."""

    def evaluate(self, evaluator: Evaluator, split: Split, folder: ResultFolder | None) -> dict[str, float]:
        """Classifies all images of a split; the text of each class is encoded only once.

        With `folder`, also writes `classes.jsonl` and `classes.html`.

        Returns:
            `classes` (mean cross entropy), `accuracy`, `top5` and `images` (number of images) on the main rank; empty
            on other ranks.
        """
        scores = score_split(evaluator, split, self.texts, self.text_batches)
        if scores is None:
            return {}
        metrics = scores.metrics()
        if folder is not None and metrics:
            stream = self.evaluation[split].streams["images"]
            answers = functools.partial(_write_answers, scores=scores, stream=stream, classes=self.classes)
            page = functools.partial(_write_page, scores=scores, stream=stream, classes=self.classes, metrics=metrics)
            folder.write("classes.jsonl", answers)
            folder.write("classes.html", page)
        return metrics


class Imagenet(Task):
    """Defines image classification by comparison with class names, or by a linear layer.

    With the head `names`, every training step draws `data.texts.samples_per_step` class names and encodes them, divided
    over ranks and micro-batches. If this number equals the number of classes, the softmax is over all classes. If the
    number is smaller, for example for ImageNet-21K, the step also encodes the class name of every image. The softmax is
    then over the classes whose names the step encodes.
    """

    Settings = ImagenetConfig
    settings: ImagenetConfig
    has_validation_loss: ClassVar[bool] = False
    formats: ClassVar[Mapping[str, Sequence[str]]] = {"images": IMAGE_FORMATS, "texts": (CLASS_NAMES,)}
    headline = Headline("accuracy")
    terms = (
        Term("classes", "images", "images: class"),
        Term("accuracy", "images", "images: class found", weight=0.0, unit="share"),
    )

    def __init__(self, config: RunConfig) -> None:
        """Checks the task's settings and the configured data sources, without reading files.

        Raises:
            ConfigError: if `data.texts` does not contain exactly one class file, or `data.texts.samples_per_step` does
                not fit the head. The head "linear" requires 0. The head "names" requires 1 to `task.num_classes`
                without mixup and cutmix, and exactly `task.num_classes` with either of them.
        """
        super().__init__(config)
        _check_class_source(config)
        settings, drawn = self.settings, config.data.texts.samples_per_step
        if settings.head == "linear":
            if drawn:
                raise ConfigError(
                    f"data.texts.samples_per_step={drawn}: the head 'linear' reads no class names in training. Set it "
                    "to 0."
                )
        elif not 0 < drawn <= settings.num_classes:
            raise ConfigError(
                f"data.texts.samples_per_step={drawn}: a step compares images with class names, of which there are "
                f"task.num_classes={settings.num_classes}. Use {settings.num_classes} for an exact softmax, or fewer "
                "where these do not fit."
            )
        elif settings.is_mixing and drawn < settings.num_classes:
            raise ConfigError(
                f"task: mixup={settings.mixup:g} and cutmix={settings.cutmix:g} need the names of all "
                f"{settings.num_classes} classes in each step, but data.texts.samples_per_step={drawn}. Raise it, or "
                "set both to 0."
            )

    @functools.cached_property
    def classes(self) -> ClassList:
        """Returns the list of classes; the first call reads the list from the class file.

        Raises:
            ConfigError: if the file cannot be read, or does not have `task.num_classes` classes.
        """
        classes = ClassList.load(self.config.data.texts.train[0].path)
        if len(classes) != self.settings.num_classes:
            raise ConfigError(
                f"task.num_classes={self.settings.num_classes}, but {classes.where} has {len(classes)} classes. "
                "Correct one of the two."
            )
        return classes

    def describe(self) -> dict[str, Any]:
        """Returns the task's name, its settings and a hash of the classes, for storing in checkpoints."""
        return {**super().describe(), "class_digest": self.classes.digest()}

    def build_head(self, model: ModelConfig, tensor: TensorParallel) -> Head:
        """Builds the contrastive head or the linear head, with uninitialised parameters."""
        if self.settings.head == "linear":
            settings = self.settings
            return LinearClassHead(model, settings.num_classes, tensor, label_smoothing=settings.label_smoothing)
        return ContrastiveHead(model, tensor)

    @property
    def step_loss(self) -> StepLoss | None:
        """Returns the loss function that compares a step's images with class names; None with the head `linear`."""
        if self.settings.head == "linear":
            return None
        return functools.partial(class_terms, label_smoothing=self.settings.label_smoothing)

    def open(self, share: RankShare) -> ImagenetRankTask:
        """Opens the tokenizer and the images that a rank reads.

        Raises:
            ConfigError: if a file cannot be read, if the class of an image is unknown, if a class name has no tokens,
                or if the weights have a linear layer for other classes.
        """
        self._check_weights()
        config, classes, texts = self.config, self.classes, self._encode()
        packing = functools.partial(pack, model=config.model, head=self.settings.head)
        size = config.training.eval_batch_size
        batches = (packing(texts[i : i + size], None, {}, embeds=True) for i in range(0, len(texts), size))
        nothing = packing([], None, {}, embeds=True)
        return ImagenetRankTask.open(
            self,
            share,
            functools.partial(build_streams, config, self.settings, classes, texts),
            functools.partial(packing, embeds=share.embeds),
            files={"tokenizers.text.path": config.tokenizers.text.path if texts else None},
            classes=classes,
            texts=texts,
            text_batches=share_of_batches(batches, nothing, share.data_parallel_rank, share.data_parallel_size),
        )

    def _check_weights(self) -> None:
        """Checks that the weights' linear layer was trained for the run's classes; applies only to the head `linear`.

        Raises:
            ConfigError: if the weights were trained with another list of classes.
        """
        stored = self.weights_description or {}
        if self.settings.head != "linear" or stored.get("head") != "linear":
            return
        if stored.get("class_digest", self.classes.digest()) != self.classes.digest():
            raise ConfigError(
                f"imagenet: {self.weights_name} have a linear layer for another list of classes than "
                f"{self.classes.where}, in number, order, keys or names, so its outputs would mean other classes. Name "
                "the list of the weights in data.texts.train, or start from weights without this head "
                "(`beit3 export WEIGHTS OUT.safetensors --no-heads`)."
            )

    def _encode(self) -> list[ClassText]:
        if self.settings.head == "linear":
            return []
        tokenizer = load_text_tokenizer(self.config)
        assert tokenizer is not None, "a run with class names has texts"
        return encode_classes(self.classes, self.settings, tokenizer, self.config.data.text_length)


TASK = Imagenet


def _check_class_source(config: RunConfig) -> None:
    texts = config.data.texts
    if len(texts.train) != 1 or texts.validation or texts.test:
        raise ConfigError(
            f"data.texts: {len(texts.train)} sources in 'train'. The task imagenet needs exactly one there and none in "
            f"other splits: the file of the classes and their names, with format {CLASS_NAMES!r}."
        )


def _write_answers(path: Path, scores: ClassScores, stream: Stream, classes: ClassList) -> None:
    """Writes one JSON object per image, with the image's file, its true class and the best-scored classes."""
    keys = [found.key for found in classes]
    with atomic_write(path) as file:
        for index, label, best in zip(*(x.tolist() for x in (scores.indices, scores.labels, scores.best)), strict=True):
            line = {"image": stream.name(index), "class": keys[label], "best": [keys[other] for other in best]}
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())


def _write_page(
    path: Path, scores: ClassScores, stream: Stream, classes: ClassList, metrics: Mapping[str, float]
) -> None:
    """Writes a page of images with true and predicted classes; images with wrong predictions come first."""
    is_right = (scores.ranks == 0).tolist()
    shown = choose_shown(is_right, _NUM_ON_PAGE)
    write_result_page(path, "Classes of images", metrics, _shown_samples(shown, scores, stream, classes))


def _shown_samples(
    places: Sequence[int], scores: ClassScores, stream: Stream, classes: ClassList
) -> Iterator[ShownSample]:
    for place in places:
        sample_index = int(scores.indices[place])
        source, index = stream.sources.locate(sample_index)
        best = [classes.names[label] for label in scores.best[place].tolist()]
        yield ShownSample(
            images=[source.source.image(index)],  # type: ignore[attr-defined]
            title=stream.name(sample_index),
            lines={"class": classes.names[int(scores.labels[place])], "model": "; ".join(best)},
            is_right=bool(scores.ranks[place] == 0),
        )
