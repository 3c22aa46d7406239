"""Defines the tasks of `beit3 bench finetune`, their models and their batches."""

# B samples of a batch, S tokens of all texts, A answers.

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.benchmarks.step.batches import draw_length, step_config
from beit3_ds.config import ModelConfig, RunConfig
from beit3_ds.data.drop_path import Slot, draw_drop_path
from beit3_ds.data.packing import pack_inputs
from beit3_ds.model import Head
from beit3_ds.tasks.captioning.head import TARGET_IDS, CaptionHead
from beit3_ds.tasks.retrieval.head import ContrastiveHead
from beit3_ds.tasks.vqa.head import ANSWER_SCORES, AnswerHead

NUM_ANSWERS = 3129
"""Number of answers in VQAv2."""
LABEL_SMOOTHING = 0.1
"""Label smoothing for captioning in the reference's recipe."""
CAPTION_MASK_RATIO = 0.7
"""Share of masked caption tokens in the reference's recipe."""
BOS, PAD, EOS = 0, 1, 2
"""Token ids of BOS, padding and EOS in the reference's vocabulary."""


class Case(NamedTuple):
    """Describes one task, with the settings of the reference's recipe."""

    image_size: int
    """Height and width of the case's images in pixels, as in the recipe for the base model in BEiT-3's released code.
    """
    tokens: tuple[float, float]
    """Log-normal distribution of the number of tokens per text: median, and standard deviation of the logarithm."""
    padded_length: int
    """Number of tokens to which the reference pads each text."""
    inputs: tuple[str, ...]
    """Kinds of input that the model takes: "images", "pairs" or "texts"."""
    final_norm: bool
    """Whether the reference's model ends with a LayerNorm."""
    build_head: Callable[..., Head]
    """Function that builds the task's head from the model config and the tensor-parallel group."""


CASES = {
    "vqa": Case(480, (9, 0.3), 64, ("pairs",), False, lambda model, tensor: AnswerHead(model, NUM_ANSWERS, tensor)),
    "retrieval": Case(384, (13, 0.25), 64, ("images", "texts"), True, ContrastiveHead),
    "captioning": Case(
        480, (13, 0.25), 32, ("pairs",), True, functools.partial(CaptionHead, label_smoothing=LABEL_SMOOTHING)
    ),
}
"""Tasks by name. The median in `Case.tokens` includes BOS and EOS. A question of VQAv2 has about 6 words, and a caption
of COCO has about 11 words."""


class Samples(NamedTuple):
    """Holds the samples of one batch, before this project packs them or the reference pads them."""

    pixels: Tensor
    """Images, (samples, 3, image_size, image_size) float32."""
    texts: tuple[Tensor, ...]
    """Token ids of each sample's text, including BOS and EOS."""
    masked: tuple[Tensor, ...]
    """Ascending positions of the masked tokens in each text; empty except in captioning."""
    scores: Tensor
    """Target score of each answer, (samples, answers) float32; used only for VQAv2."""


def mask_id(model: ModelConfig) -> int:
    """Returns the id of the mask token. In the reference's vocabulary, 8 unused ids follow the mask token."""
    return model.text_vocab_size - 9


def case_config(task: str, size: str, image_size: int | None = None, **model: Any) -> RunConfig:
    """Returns the run config of a task on one rank in float32, with the parameter layout of the released models.

    Args:
        task: a key of `CASES`.
        size: model size.
        image_size: height and width of images in pixels. None means the size in the reference's recipe.
        model: further keys for the section "model".
    """
    case = CASES[task]
    return step_config(
        size, image_size=image_size or case.image_size, final_norm=case.final_norm, inputs=list(case.inputs), **model
    )


def draw_samples(task: str, config: RunConfig, number: int, count: int) -> Samples:
    """Draws `count` samples with random pixels, token ids and scores.

    The batch number `number` is the seed, so all processes draw equal values.
    """
    rng, case, model = np.random.default_rng([23, number]), CASES[task], config.model
    pixels = rng.uniform(-1, 1, (count, 3, model.image_size, model.image_size)).astype(np.float32)
    texts, masked = [], []
    for _ in range(count):
        length = draw_length(rng, case.tokens, case.padded_length)
        ids = torch.from_numpy(rng.integers(3, model.text_vocab_size - 9, length))
        ids[0], ids[-1] = BOS, EOS
        texts.append(ids)
        hidden = max(1, round((length - 1) * CAPTION_MASK_RATIO)) if task == "captioning" else 0
        masked.append(torch.from_numpy(np.sort(rng.choice(np.arange(1, length), hidden, replace=False))))
    scores = np.where(rng.random((count, NUM_ANSWERS)) < 3 / NUM_ANSWERS, rng.choice([0.3, 0.6, 0.9, 1.0]), 0.0)
    return Samples(torch.from_numpy(pixels), tuple(texts), tuple(masked), torch.from_numpy(scores.astype(np.float32)))


def pack_samples(task: str, config: RunConfig, samples: Samples, number: int) -> PackedBatch:
    """Packs samples as in a run of the task, including targets and random factors of stochastic depth.

    Args:
        task: a key of `CASES`.
        config: config of the run.
        samples: samples to pack.
        number: batch number, which seeds the random factors.
    """
    model, count = config.model, len(samples.texts)
    texts = [ids.numpy() for ids in samples.texts]
    if task == "retrieval":
        slots = [Slot("pairs", i, kind) for kind in range(2) for i in range(count)]
        inputs: dict[str, Any] = {"num_images": count, "texts": texts}
    else:
        slots = [Slot("pairs", i) for i in range(count)]
        inputs = {"num_images": 0, "captions": [_hide(samples, i, mask_id(model)) for i in range(count)]}
    batch = pack_inputs(
        pixels=samples.pixels,
        num_patches=model.num_patches,
        drop_path=draw_drop_path(model.drop_path_rate, model.num_layers, 0, number, slots),
        **inputs,
    )
    return _WITH_TARGETS[task](batch, samples)


def _hide(samples: Samples, number: int, mask: int) -> Any:
    ids = samples.texts[number].clone()
    ids[samples.masked[number]] = mask
    return ids.numpy()


def _ask(batch: PackedBatch, samples: Samples) -> PackedBatch:
    picked = batch.layout.first_rows(1)
    return dataclasses.replace(
        batch, head_rows=picked.rows, head_row_counts=picked.counts, targets={ANSWER_SCORES: samples.scores}
    )


def _match(batch: PackedBatch, samples: Samples) -> PackedBatch:
    picked = batch.layout.first_rows(0, 3)
    return dataclasses.replace(batch, head_rows=picked.rows, head_row_counts=picked.counts)


def _describe(batch: PackedBatch, samples: Samples) -> PackedBatch:
    batch = dataclasses.replace(batch, causal_captions=True)
    starts = batch.layout.first_rows(2).rows
    rows = torch.cat([start + masked for start, masked in zip(starts, samples.masked, strict=True)])
    ids = torch.cat([ids[masked] for ids, masked in zip(samples.texts, samples.masked, strict=True)])
    return dataclasses.replace(batch, head_rows=rows, head_row_counts=(0, 0, len(rows), 0), targets={TARGET_IDS: ids})


_WITH_TARGETS: dict[str, Callable[[PackedBatch, Samples], PackedBatch]] = {
    "vqa": _ask,
    "retrieval": _match,
    "captioning": _describe,
}
