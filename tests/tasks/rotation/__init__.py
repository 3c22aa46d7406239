"""Implements a complete toy task: predicting which of four rotations an image has."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.config.data import Split
from beit3_ds.data.images.augmentation import CenterViews
from beit3_ds.data.packing import pack_inputs, stack_views
from beit3_ds.data.samples import ImageSourceSamples, SampleKey, Stream, open_image_stream
from beit3_ds.model import Head
from beit3_ds.parallel import TensorParallel
from beit3_ds.tasks import Headline, RankShare, RankTask, Task, Term


class TurnedImages(ImageSourceSamples):
    def prepare(self, index: int, key: SampleKey) -> tuple[str, Tensor, int]:
        view = self.views(self.read(index), key.rng("view")).model
        turn = int(key.rng("turn").integers(4))
        return self.name(index), torch.rot90(view, turn, (1, 2)), turn


class RotationHead(Head):
    def __init__(self, config: ModelConfig, tensor: TensorParallel) -> None:
        super().__init__()
        self.turn = nn.Linear(config.hidden_size, 4)

    def forward(self, h_MD: Tensor, batch: PackedBatch, with_loss: bool) -> Tensor:
        logits = self.turn(h_MD).float()
        if not with_loss:
            return logits
        turns = batch.targets["turns"]
        right = (logits.argmax(1) == turns).sum()
        return torch.stack([F.cross_entropy(logits, turns, reduction="sum"), right.float()])


class Rotation(Task):
    headline = Headline("accuracy")
    terms = (Term("turn", "images", "turns"), Term("accuracy", "images", "turns found", weight=0.0, unit="share"))

    def build_head(self, model: ModelConfig, tensor: TensorParallel) -> RotationHead:
        return RotationHead(model, tensor)

    def open(self, share: RankShare) -> RankTask:
        return RankTask.open(self, share, self._build_streams, functools.partial(self._pack, share.embeds))

    def _build_streams(self, split: Split) -> dict[str, Stream]:
        size = self.config.model.image_size
        build = functools.partial(TurnedImages, views=CenterViews(image_size=size, tokenizer_image_size=size))
        return {"images": open_image_stream(self.config.data, "images", split, build)}

    def _pack(
        self, embeds: bool, samples: Sequence[Any], drop_path: Tensor | None, sources: Mapping[str, int]
    ) -> PackedBatch:
        names, views, turns = zip(*samples, strict=True) if samples else ((), (), ())
        batch = pack_inputs(
            num_images=len(samples),
            pixels=stack_views(views, self.config.model.image_size) if embeds else None,
            num_patches=self.config.model.num_patches,
            drop_path=drop_path,
            sample_names=names,
            sources=sources,
        )
        cls_rows = torch.arange(len(samples)) * batch.image_length
        counts = {"head_row_counts": (len(samples), 0, 0, 0), "term_counts": (len(samples),) * 2}
        return dataclasses.replace(
            batch, head_rows=cls_rows, targets={"turns": torch.tensor(turns, dtype=torch.int64)}, **counts
        )


TASK = Rotation
