"""Implements image-text retrieval: contrastive fine-tuning of a dual encoder, and recall (paper section 3.1)."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from beit3_ds.config import InputKind, ModelConfig
from beit3_ds.config.data import IMAGE_FORMATS, Split
from beit3_ds.data.images.captioned import EachImage
from beit3_ds.data.samples import Stream
from beit3_ds.data.validation_overlap import describe_shared_images
from beit3_ds.model import Head, StepLoss
from beit3_ds.parallel import TensorParallel
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks.rank_task import Evaluator, RankShare, RankTask
from beit3_ds.tasks.results import SampleResults
from beit3_ds.tasks.retrieval.config import RetrievalConfig
from beit3_ds.tasks.retrieval.contrastive import contrastive_sums
from beit3_ds.tasks.retrieval.head import IMAGE_FEATURES, TEXT_FEATURES, ContrastiveHead
from beit3_ds.tasks.retrieval.packing import CAPTION_KEYS, IMAGE_INDICES, pack
from beit3_ds.tasks.retrieval.results import ResultFiles, Retrieved
from beit3_ds.tasks.retrieval.samples import CAPTION_FORMATS, build_stream, open_sources
from beit3_ds.tasks.task import Headline, Task, Term
from beit3_ds.tokenizers.text import load_text_tokenizer


@dataclass(frozen=True, kw_only=True)
class RetrievalRankTask(RankTask):
    """Runs image-text retrieval on one rank; holds the opened images and captions."""

    shown_queries: int
    """Number of images for which the result page shows retrieved captions. Also the number of captions for which the
    page shows retrieved images."""

    def evaluate(self, evaluator: Evaluator, split: Split, folder: ResultFolder | None) -> dict[str, float]:
        """Computes the recall at 1, 5 and 10 of a split, from images to captions and from captions to images.

        Every image and every caption is encoded once. The main rank gathers all features and computes the metrics. With
        `folder`, the main rank also writes the results as JSON and as a page.

        Returns:
            The metrics of `Retrieved.metrics` on the main rank; empty on other ranks.
        """
        images, texts = SampleResults(), SampleResults()
        for _, features in evaluator.predict(evaluator.batches(split)):
            if features is not None and evaluator.mesh.tensor.rank == 0:
                rows = features.rows
                images.add(rows[IMAGE_INDICES], features=rows[IMAGE_FEATURES])
                texts.add(rows[CAPTION_KEYS], features=rows[TEXT_FEATURES])
        found_images, found_texts = images.gather(evaluator.mesh), texts.gather(evaluator.mesh)
        if found_images is None or found_texts is None or not len(found_images):
            return {}
        retrieved = Retrieved(
            found_images.indices,
            found_images.tensor("features"),
            found_texts.indices,
            found_texts.tensor("features"),
            evaluator.device,
        )
        metrics = retrieved.metrics()
        if folder is not None:
            stream = self.evaluation[split].streams["pairs"]
            ResultFiles(stream=stream, retrieved=retrieved).write(folder, metrics, self.shown_queries)
        return metrics


class Retrieval(Task):
    """Defines image-text retrieval with separate encoding of images and texts (paper section 3.1).

    The contrastive loss compares all pairs of a step. A training sample is an image with one of its captions. Over n
    epochs, an image with n captions is trained with each caption once. COCO has five captions per image, so five epochs
    equal one epoch of Microsoft's BEiT-3 code, which lists an image once per caption.
    """

    Settings = RetrievalConfig
    settings: RetrievalConfig
    has_validation_loss: ClassVar[bool] = False
    formats: ClassVar[Mapping[str, Sequence[str]]] = {"pairs": (*IMAGE_FORMATS, *CAPTION_FORMATS)}
    headline = Headline("mean_recall")

    terms = (
        Term("image_to_text", "pairs", "caption of an image among all of the step", weight=0.5),
        Term("text_to_image", "pairs", "image of a caption among all of the step", weight=0.5),
        Term("texts_found", "pairs", "images whose caption scores highest in the step", weight=0.0, unit="share"),
        Term("images_found", "pairs", "captions whose image scores highest in the step", weight=0.0, unit="share"),
    )

    @property
    def inputs(self) -> tuple[InputKind, ...]:
        """Returns "images" and "texts", because the image and the caption of a pair are encoded separately."""
        return ("images", "texts")

    def build_head(self, model: ModelConfig, tensor: TensorParallel) -> Head:
        """Builds the two projections and the temperature, with uninitialised parameters."""
        return ContrastiveHead(model, tensor)

    @property
    def step_loss(self) -> StepLoss:
        """Returns the function that computes the contrastive loss over all pairs of a step."""
        return functools.partial(contrastive_sums, mask_duplicates=self.settings.mask_duplicates)

    def head_flops(self, term_counts: Sequence[float]) -> float:
        """Returns the floating-point operations of the head's forward pass; a multiply-add counts as 2.

        Args:
            term_counts: one number per loss term; only the first, the number of pairs, is used.
        """
        return 4 * term_counts[0] * self.config.model.hidden_size**2

    def open(self, share: RankShare) -> RetrievalRankTask:
        """Opens the tokenizer, and the images and captions that a rank reads.

        Raises:
            ConfigError: if a file cannot be read, or a caption or an image is missing.
        """
        config = self.config
        tokenizer = load_text_tokenizer(config)
        assert tokenizer is not None, "pairs have captions"
        opened = {split: open_sources(config.data, split) for split in share.splits} if share.reads else {}
        if share.is_main:
            annotated = {split: [x for x in sources if isinstance(x, EachImage)] for split, sources in opened.items()}
            for line in describe_shared_images(annotated):
                print(line, flush=True)

        def build_streams(split: Split) -> Mapping[str, Stream]:
            return {"pairs": build_stream(config, opened[split], tokenizer, split)}

        return RetrievalRankTask.open(
            self,
            share,
            build_streams,
            functools.partial(pack, model=config.model, embeds=share.embeds),
            files={"tokenizers.text.path": config.tokenizers.text.path},
            shown_queries=self.settings.shown_queries,
        )


TASK = Retrieval
