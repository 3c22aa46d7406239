"""Converts between rows of patches and two-dimensional feature maps."""

# T patches of all images, B images, D width, H and W rows and columns of the largest grid.

from torch import Tensor

from beit3_ds.patch_grids import Grids, canvas_grid, patch_places


def to_canvas(x_TD: Tensor, grids: Grids, window_size: int) -> Tensor:
    """Returns the feature map of each image, (B, D, H, W); cells outside an image's grid are zero.

    Args:
        x_TD: rows of the patches of all images, ordered window by window (`patch_grids`).
        grids: rows and columns of each image's patch grid. H and W are the largest numbers of rows and columns.
        window_size: side, in patches, of the windows by which the rows are ordered (`ModelConfig.dense.window_size`).
    """
    height, width = canvas_grid(grids)
    places = patch_places(grids, window_size, x_TD.device)
    index_T = (places.image_T * height + places.row_T) * width + places.column_T
    canvas = x_TD.new_zeros(len(grids) * height * width, x_TD.shape[1]).index_copy(0, index_T, x_TD)
    return canvas.view(len(grids), height, width, x_TD.shape[1]).permute(0, 3, 1, 2)


def from_canvas(maps_BDHW: Tensor, grids: Grids, window_size: int) -> Tensor:
    """Returns the rows of the patches of all images, (T, D), ordered window by window; inverse of `to_canvas`."""
    places = patch_places(grids, window_size, maps_BDHW.device)
    height, width = maps_BDHW.shape[2:]
    index_T = (places.image_T * height + places.row_T) * width + places.column_T
    return maps_BDHW.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, index_T)
