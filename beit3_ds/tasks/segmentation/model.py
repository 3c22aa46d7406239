"""Combines BEiT-3's blocks, a ViT-Adapter between these blocks, and the segmentation head."""

# B images, N patches of an image, T patches of all images, D hidden.

from typing import Any

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.model import LossOutput, TaskModel
from beit3_ds.model.dense.canvas import from_canvas, to_canvas
from beit3_ds.parallel import DividedSamples, sum_gradients
from beit3_ds.patch_grids import Grid
from beit3_ds.tasks.segmentation.head import SegmentationHead, common_grid, divide_samples
from beit3_ds.tasks.segmentation.packing import DROP_PATH


class SegmentationModel(TaskModel):
    """Combines BEiT-3's blocks with the segmentation head; all images of a micro-batch have one size.

    With an adapter, the blocks run in groups. Each tensor-parallel rank runs the adapter on a part of the images.
    Before and after each group of blocks, the tensor-parallel ranks exchange the rows of all images (`DividedSamples`).
    """

    def forward(  # type: ignore[override]
        self,
        batch: PackedBatch,
        loss_factors: Tensor | None,
        x_TD: Tensor | None = None,
        layers: range | None = None,
    ) -> Any:
        """Runs one micro-batch through the whole model; there is no pipeline parallelism.

        `StageModel.forward` describes arguments and results, and `SegmentationHead.segment` describes predictions.
        """
        head = self.heads
        assert isinstance(head, SegmentationHead), "the last layer is here, because there is no pipeline"
        if head.adapter is None:
            return super().forward(batch, loss_factors, x_TD, layers)
        sum_gradients(head, self.tensor)
        with_loss = loss_factors is not None
        output = head.segment(self.adapted_maps(batch, with_loss=with_loss), batch, with_loss)
        return output if loss_factors is None else LossOutput((output * loss_factors).sum(), output.detach())

    def adapted_maps(self, batch: PackedBatch, *, with_loss: bool = False) -> tuple[Tensor, ...]:
        """Runs the embeddings, the blocks and the adapter; returns the adapter's four feature maps.

        Args:
            batch: the packed micro-batch.
            with_loss: True divides the images over the tensor-parallel ranks, as for the loss. With False, each rank
                computes all images.

        Returns:
            Four maps of this rank's images, with 1/4, 1/8, 1/16 and 1/32 of the height and width, each (images, hidden
            size, rows, columns).
        """
        head = self.heads
        assert isinstance(head, SegmentationHead) and head.adapter is not None, "the model has no adapter"
        assert self.embeddings is not None and batch.pixels is not None, "there is no pipeline"
        adapter = head.adapter
        divided = divide_samples(batch, self.tensor, with_loss=with_loss)
        grid = common_grid(batch, self.config.patch_size)
        factors = batch.targets.get(DROP_PATH)
        dtype = next(adapter.parameters()).dtype
        x_TD = self.embeddings(batch)
        with torch.autocast(x_TD.device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            return adapter(
                batch.pixels[divided.own],
                self._own_patches(x_TD, batch, divided, grid),
                grid,
                lambda x_BND, blocks: self._run_blocks(x_BND, blocks, batch, divided, grid),
                None if factors is None else factors[divided.own],
            )

    def _run_blocks(
        self, x_BND: Tensor, blocks: range, batch: PackedBatch, divided: DividedSamples, grid: Grid
    ) -> Tensor:
        """Runs a range of blocks. Each rank passes the patches of its own images, and gets back the new patches of
        these images.

        The tensor-parallel ranks merge their patches before the blocks, and compute each block together.

        Returns:
            The patches of this rank's images, (images, patches, hidden size), in row-major order.
        """
        with torch.autocast(x_BND.device.type, enabled=False):
            x_TD = self.tensor.scatter_rows(divided.merge(self._as_stream(x_BND, grid)))
            x_TD = self.run_layers(batch, x_TD, range(blocks.start + 1, blocks.stop + 1))
            return self._own_patches(x_TD, batch, divided, grid)

    def _own_patches(self, x_TD: Tensor, batch: PackedBatch, divided: DividedSamples, grid: Grid) -> Tensor:
        """Returns the patches of this rank's images, (images, patches, hidden size), in row-major order.

        The tensor-parallel ranks gather the rows.

        Args:
            x_TD: this rank's rows of the packed micro-batch.
            batch: the packed micro-batch.
            divided: division of the images over the tensor-parallel ranks.
            grid: rows and columns of patches per image.
        """
        rows_TD = divided.take(self.tensor.gather_rows(x_TD, batch.num_rows))
        own_grids = batch.image_grids[divided.own]
        if self._window_size and own_grids:
            return to_canvas(rows_TD, own_grids, self._window_size).flatten(2).transpose(1, 2)
        return rows_TD.view(len(own_grids), grid[0] * grid[1], rows_TD.shape[1])

    def _as_stream(self, x_BND: Tensor, grid: Grid) -> Tensor:
        """Reorders patches from row-major order to the order of the packed rows.

        With attention windows, the packed rows are ordered window by window. Without windows, they are in row-major
        order. The shape changes from (images, patches, hidden size) to (images * patches, hidden size).
        """
        if not self._window_size:
            return x_BND.flatten(0, 1)
        return from_canvas(x_BND.transpose(1, 2).unflatten(2, grid), (grid,) * len(x_BND), self._window_size)

    @property
    def _window_size(self) -> int:
        assert self.config.dense is not None, "the task checks model.dense"
        return self.config.dense.window_size
