"""Runs one process of `beit3 bench finetune`. For each request, it trains one step or generates captions."""

import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from beit3_ds.benchmarks.finetune.benchmark import BLIP, DECODING, OURS
from beit3_ds.benchmarks.finetune.cases import BOS, EOS, Samples, case_config, draw_samples, mask_id, pack_samples
from beit3_ds.benchmarks.turns import Turn, device_of_turns, serve_turns
from beit3_ds.config import RunConfig

NUM_BEAMS, LENGTH_PENALTY, MAX_LENGTH = 3, 0.6, 15
"""Settings of the beam search in the reference's recipe. `MAX_LENGTH` counts BOS, EOS and a mask token, so a caption
has at most 12 other tokens."""
IMAGES_AT_ONCE = 4
"""Number of images per call of caption generation. The reference's attention takes about 0.5 GB per beam and image."""


class TrainingSide:
    """Trains with one of the compared implementations, one step per request."""

    def __init__(self, task: str, side: str, config: RunConfig, count: int) -> None:
        from beit3_ds.benchmarks.finetune.reference import ReferenceTrainer
        from beit3_ds.benchmarks.finetune.training import Trainer

        self.task, self.config, self.count = task, config, count
        is_ours = side == OURS
        self.trainer: Any = Trainer(task, config) if is_ours else ReferenceTrainer(task, config, device_of_turns())
        self.prepare = self._prepare_ours if is_ours else self._prepare_reference

    def _prepare_ours(self, number: int) -> Turn:
        samples = draw_samples(self.task, self.config, number, self.count)
        batch = pack_samples(self.task, self.config, samples, number)
        return self.trainer.prepare(batch), self._facts(samples)

    def _prepare_reference(self, number: int) -> Turn:
        samples = draw_samples(self.task, self.config, number, self.count)
        moved = _to(samples, device_of_turns())
        return lambda: self.trainer.step(moved), self._facts(samples)

    def _facts(self, samples: Samples) -> dict[str, Any]:
        return {"samples": self.count, "tokens": [len(text) for text in samples.texts]}


class DecodingSide:
    """Generates captions with one of the compared implementations, for one batch of images per request.

    The models have random weights.
    """

    def __init__(self, side: str, config: RunConfig, count: int) -> None:
        self.side, self.config, self.count = side, config, count
        self.device = device_of_turns()
        self.model = self._build().to(self.device).eval()
        if self.device.type == "cuda":
            self.model.to(torch.bfloat16)

    def prepare(self, number: int) -> Turn:
        """Returns a `Turn` of two members: the function that generates a batch's captions, and the number of samples in
        the batch.

        Args:
            number: index of the batch.
        """
        pixels = draw_samples("captioning", self.config, number, self.count).pixels.to(self.device)
        pixels = pixels.to(next(self.model.parameters()).dtype)
        return lambda: self._generate_all(pixels), {"samples": self.count}

    def _build(self) -> Any:
        from beit3_ds.benchmarks.finetune.decoding import build_blip
        from beit3_ds.benchmarks.finetune.reference import ReferenceModel
        from beit3_ds.model import TaskModel
        from beit3_ds.tasks.captioning.head import CaptionHead

        if self.side == BLIP:
            return build_blip(self.config.model.image_size)
        torch.manual_seed(self.config.training.seed)
        if self.side == OURS:
            model = TaskModel(CaptionHead, self.config.model)
            model.initialize(self.config.training.seed)
            return model
        return ReferenceModel("captioning", self.config.model)

    def _generate_all(self, pixels: torch.Tensor) -> float:
        parts = [len(part) * self._generate(part) for part in pixels.split(IMAGES_AT_ONCE)]
        return sum(parts) / len(pixels)

    def _generate(self, pixels: torch.Tensor) -> float:
        """Generates one caption per image and returns the mean number of token ids per caption."""
        from beit3_ds.benchmarks.finetune.decoding import blip_captions, reference_captions
        from beit3_ds.model.generation import BeamSearch, generate

        if self.side == BLIP:
            blip_captions(self.model, pixels, NUM_BEAMS, MAX_LENGTH)
            return float(MAX_LENGTH)
        if self.side == OURS:
            search = BeamSearch(num_beams=NUM_BEAMS, length_penalty=LENGTH_PENALTY, max_length=MAX_LENGTH)
            tokens = SimpleNamespace(bos_id=BOS, eos_id=EOS, mask_id=mask_id(self.config.model))
            captions = [caption.ids for caption in generate(self.model, pixels, tokens, search)]
            return sum(map(len, captions)) / len(captions)
        words = reference_captions(self.model, pixels, NUM_BEAMS, LENGTH_PENALTY, MAX_LENGTH)
        return sum(map(len, words)) / len(words)


def build_side(task: str, side: str, size: str, image_size: int | None, count: int) -> TrainingSide | DecodingSide:
    """Builds one of the compared implementations for a task.

    Args:
        task: a key of `cases.CASES`, or `DECODING`.
        side: name of the implementation: `OURS`, `REFERENCE` or `BLIP`.
        size: model size.
        image_size: height and width of images in pixels. None means the size in the reference's recipe.
        count: number of samples per training step. For `DECODING`, number of images per batch.
    """
    config = case_config("captioning" if task == DECODING else task, size, image_size)
    if task == DECODING:
        return DecodingSide(side, config, count)
    if device_of_turns().type == "cuda":
        config = replace(config, deepspeed={**config.deepspeed, "bf16": {"enabled": True}})
    return TrainingSide(task, side, config, count)


def _to(samples: Samples, device: torch.device) -> Samples:
    return Samples(
        samples.pixels.to(device),
        tuple(text.to(device) for text in samples.texts),
        tuple(masked.to(device) for masked in samples.masked),
        samples.scores.to(device),
    )


if __name__ == "__main__":
    _, task, side, size, image_size, count, descriptor = sys.argv
    served = build_side(task, side, size, int(image_size) or None, int(count))
    serve_turns(served.prepare, sys.stdin, os.fdopen(int(descriptor), "w"))
