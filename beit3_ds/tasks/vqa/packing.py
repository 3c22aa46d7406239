"""Packs questions about images into one micro-batch."""

# P pairs, A answers.

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.data.packing import pack_inputs, stack_views
from beit3_ds.layout import PARTS
from beit3_ds.tasks.vqa.head import ANSWER_SCORES
from beit3_ds.tasks.vqa.samples import VqaSample

QUESTION_INDICES = "question_indices"
"""Key in `PackedBatch.targets`: index of each question in its split, (questions,) int64."""

_IMAGES_OF_PAIRS = next(i for i, part in enumerate(PARTS) if part.modality == "vision" and part.fused_expert)


def pack(
    samples: Sequence[VqaSample],
    drop_path: Tensor | None,
    sources: Mapping[str, int],
    model: ModelConfig,
    num_answers: int,
    *,
    embeds: bool,
    predicts: bool,
) -> PackedBatch:
    """Packs each question with its image as one image-text pair.

    Args:
        samples: questions with images; may be empty.
        drop_path: value of `PackedBatch.drop_path`.
        sources: value of `PackedBatch.sources`.
        model: the model's configuration.
        num_answers: number of answers in the answer list.
        embeds: whether the batch contains the pixels; a pipeline stage without the embedding layer needs none.
        predicts: whether to keep the target scores in the batch.
    """
    batch = pack_inputs(
        num_images=0,
        pixels=stack_views([sample.view for sample in samples], model.image_size) if embeds else None,
        num_patches=model.num_patches,
        captions=[sample.ids for sample in samples],
        drop_path=drop_path,
        sample_names=[sample.name for sample in samples],
        sources=sources,
    )
    targets = {QUESTION_INDICES: torch.tensor([sample.sample_index for sample in samples], dtype=torch.int64)}
    if predicts:
        scores = [sample.scores for sample in samples]
        targets[ANSWER_SCORES] = torch.stack(scores) if scores else torch.empty(0, num_answers)
    cls = batch.layout.first_rows(_IMAGES_OF_PAIRS)
    return dataclasses.replace(
        batch,
        head_rows=cls.rows,
        head_row_counts=cls.counts,
        term_counts=(len(samples), len(samples)),
        targets=targets,
    )
