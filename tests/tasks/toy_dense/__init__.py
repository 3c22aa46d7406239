"""Implements a complete toy task on images of different sizes: predicting the mean color of each patch."""

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
from beit3_ds.data.packing import pack_grids
from beit3_ds.data.samples import ImageSourceSamples, SampleKey, Stream, open_image_stream
from beit3_ds.model import Head
from beit3_ds.model.dense.canvas import from_canvas, to_canvas
from beit3_ds.parallel import DividedSamples, TensorParallel, sum_gradients
from beit3_ds.patch_grids import Grids
from beit3_ds.pixels import to_floats
from beit3_ds.tasks import RankShare, RankTask, Task, Term


class CroppedImages(ImageSourceSamples):
    def prepare(self, index: int, key: SampleKey) -> tuple[str, Tensor]:
        view = to_floats(self.views(self.read(index), key.rng("view")).model[None])[0]
        height, width = (int(side) for side in key.rng("size").integers(5, 41, 2))
        return self.name(index), view[:, :height, :width].contiguous()


class ColorHead(Head):
    """Applies a convolution over maps, a grid sampling, and a layer that gets no rows."""

    def __init__(self, config: ModelConfig, tensor: TensorParallel) -> None:
        super().__init__()
        assert config.dense is not None
        self.tensor, self.window_size = tensor, config.dense.window_size
        self.convolution = nn.Conv2d(config.hidden_size, 8, 3, padding=1)
        self.colors, self.unused = nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, h_TD: Tensor, batch: PackedBatch, with_loss: bool) -> Tensor:
        grids = batch.image_grids
        if not with_loss:
            return self._predict(h_TD, grids)
        sum_gradients(self, self.tensor)
        divided = DividedSamples(self.tensor, tuple(height * width for height, width in grids))
        colors = self._predict(divided.take(h_TD), grids[divided.own])
        start, stop = divided.own_rows
        return divided.sum_terms(F.mse_loss(colors, batch.targets["colors"][start:stop], reduction="sum")[None])

    def _predict(self, h_TD: Tensor, grids: Grids) -> Tensor:
        maps = self.convolution(to_canvas(h_TD, grids, self.window_size)).tanh()
        places = F.affine_grid(torch.eye(2, 3)[None], [1, *maps.shape[1:]], align_corners=False)
        sampled = F.grid_sample(maps, places.expand(len(maps), -1, -1, -1), align_corners=False)
        rows = from_canvas(sampled, grids, self.window_size)
        return self.colors(rows).float() + self.unused(rows[:0]).sum() * 0


class ToyDense(Task):
    terms = (Term("color", "images", "colors of patches", unit="squared error"),)

    def build_head(self, model: ModelConfig, tensor: TensorParallel) -> ColorHead:
        return ColorHead(model, tensor)

    def open(self, share: RankShare) -> RankTask:
        return RankTask.open(self, share, self._build_streams, functools.partial(self._pack, share.embeds))

    def _build_streams(self, split: Split) -> dict[str, Stream]:
        build = functools.partial(CroppedImages, views=CenterViews(image_size=40, tokenizer_image_size=40))
        return {"images": open_image_stream(self.config.data, "images", split, build)}

    def _pack(
        self, embeds: bool, samples: Sequence[Any], drop_path: Tensor | None, sources: Mapping[str, int]
    ) -> PackedBatch:
        model = self.config.model
        assert model.dense is not None
        names, images = zip(*samples, strict=True) if samples else ((), ())
        batch = pack_grids(images, model.patch_size, drop_path=drop_path, sample_names=names, sources=sources)
        assert batch.pixels is not None
        means = F.avg_pool2d(batch.pixels, model.patch_size)
        colors = from_canvas(means, batch.image_grids, model.dense.window_size)
        return dataclasses.replace(
            batch,
            pixels=batch.pixels if embeds else None,
            term_counts=(len(images),),
            targets={"colors": colors},
        )


TASK = ToyDense
