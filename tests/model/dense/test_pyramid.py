"""Tests the feature pyramid: images of a batch do not affect each other, and a batch may have no images."""

import torch

from beit3_ds.model.dense.canvas import to_canvas
from beit3_ds.model.dense.pyramid import SimpleFeaturePyramid
from beit3_ds.patch_grids import Grids


def _maps(pyramid: SimpleFeaturePyramid, x_TD: torch.Tensor, grids: Grids) -> dict[str, torch.Tensor]:
    return dict(pyramid(to_canvas(x_TD, grids, 3), grids))


def test_a_map_does_not_depend_on_larger_images_of_the_batch() -> None:
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(16, 8).double()
    for parameter in pyramid.parameters():
        torch.nn.init.normal_(parameter)  # biases too
    grids = ((5, 3), (8, 8), (1, 7))
    rows = [torch.randn(height * width, 16, dtype=torch.float64) - 2 for height, width in grids]
    together = _maps(pyramid, torch.cat(rows), grids)
    for number, (grid, own) in enumerate(zip(grids, rows, strict=True)):
        for name, alone in _maps(pyramid, own, (grid,)).items():
            height, width = alone.shape[2:]
            of_batch = together[name][number]
            # Without zeros between the convolutions, biases outside of an image reach its edge; without minus infinity
            # below the pooling, zeros outside win over negative features.
            torch.testing.assert_close(of_batch[:, :height, :width], alone[0])
            assert not of_batch[:, height:].any() and not of_batch[:, :, width:].any()


def test_a_batch_without_images_gives_maps_without_images() -> None:
    pyramid = SimpleFeaturePyramid(16, 8)
    maps = _maps(pyramid, torch.empty(0, 16), ())
    assert list(maps) == list(pyramid.strides) and all(len(x) == 0 for x in maps.values())
