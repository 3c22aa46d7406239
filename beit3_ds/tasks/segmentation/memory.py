"""Estimates the activation memory of the segmentation head, for `beit3 check`."""

# D hidden size, d decoder's hidden size, L cells of the three coarser maps, N patches.

from beit3_ds.config import ModelConfig
from beit3_ds.model.dense.pyramid_memory import pyramid_memory
from beit3_ds.model.vit_adapter import AdapterConfig
from beit3_ds.tasks.segmentation.config import DecoderConfig, SegmentationConfig

_STRIDES = (8, 16, 32)  # of the three coarser maps
_PIXEL_POINTS = 12  # four points in each of three maps, fixed in transformers
_FLOAT, _INDEX = 4, 8  # bytes


def crop_memory(model: ModelConfig, settings: SegmentationConfig, element_size: int, *, recomputes: bool) -> int:
    """Returns the bytes of head activations that autograd keeps per crop of `image_size` pixels per side.

    Covers the adapter or the pyramid, the pixel decoder and the query decoder. Counts the inputs of convolutions,
    linear layers, activation functions and norms, and the float32 tensors of deformable attention.

    Does not count statistics of norms, and memory that is needed only during an operation or during recomputation. Does
    not count the matched masks of the loss either, because their number depends on the image. For these masks, the loss
    keeps two float32 maps per mask and layer, each with at least 1/4 of the crop's height and width.

    Args:
        model: the model's configuration.
        settings: the task's settings.
        element_size: bytes per element of an activation.
        recomputes: whether the backward pass recomputes injectors and extractors. If True, the tensors inside these
            modules are not counted. Their inputs, and the patches and pyramid rows after the last extractor, are still
            counted.
    """
    if settings.adapter is None:
        maps = model.num_patches * pyramid_memory(model.hidden_size, settings.decoder.hidden_size, element_size)
        maps += model.num_patches * model.hidden_size * element_size if model.final_norm else 0
    else:
        maps = _prior(model, settings.adapter, element_size)
        maps += _interactions(model, settings.adapter, element_size, recomputes=recomputes)
    decoder = settings.decoder
    return int(maps + _pixel_decoder(model, decoder, element_size) + _query_decoder(model, decoder, element_size))


def _cells(model: ModelConfig, stride: int) -> int:
    return (model.image_size // stride) ** 2


def _coarser(model: ModelConfig) -> int:
    """Returns the total number of cells of the feature maps with strides 8, 16 and 32."""
    return sum(_cells(model, stride) for stride in _STRIDES)


def _prior(model: ModelConfig, adapter: AdapterConfig, element_size: int) -> int:
    """Returns the bytes of activations that autograd keeps for the spatial prior module and the four output norms.

    Of each output norm, both the input and the output are counted.
    """
    # Per convolution the input of its norm and the output of its ReLU; one max pooling keeps indices.
    channels = {2: 6, 4: 1, 8: 4, 16: 8, 32: 8}
    elements = adapter.conv_channels * sum(count * _cells(model, stride) for stride, count in channels.items())
    elements += 2 * model.hidden_size * (_cells(model, 4) + _coarser(model))
    return elements * element_size + adapter.conv_channels * _cells(model, 4) * _INDEX


def _interactions(model: ModelConfig, adapter: AdapterConfig, element_size: int, *, recomputes: bool) -> int:
    """Returns the bytes of activations that autograd keeps for all injectors and extractors.

    With recomputation, autograd keeps only the patches and pyramid rows before each interaction and after the last
    interaction.
    """
    hidden, patches, coarser = model.hidden_size, model.num_patches, _coarser(model)
    width, num_interactions = adapter.value_size(hidden), adapter.num_interactions
    if recomputes:
        return (num_interactions + 1) * hidden * (patches + coarser) * element_size
    injectors = num_interactions * (3 * patches + coarser) * hidden * element_size
    injectors += num_interactions * _deformable(
        patches, coarser, width, adapter.num_heads, 3 * adapter.num_points, element_size
    )
    # Inputs and outputs of two norms, the FFN's output for stochastic depth, and three inputs within the FFN.
    per_cell = (4 + (model.drop_path_rate > 0)) * hidden + 3 * int(hidden * adapter.ffn_ratio)
    extractor = (coarser * per_cell + patches * hidden) * element_size
    extractor += _deformable(coarser, patches, width, adapter.num_heads, adapter.num_points, element_size)
    last = hidden * (patches + coarser) * element_size
    return injectors + (num_interactions + adapter.num_extra_extractors) * extractor + last


def _deformable(queries: int, rows: int, width: int, num_heads: int, num_points: int, element_size: int) -> int:
    """Returns the bytes for one deformable attention: values, sampling locations, weights, sampled values and the
    output.

    Args:
        queries: number of queries.
        rows: number of cells that the queries sample from; each cell has one value row.
        width: total width of the values over all heads.
        num_heads: number of heads.
        num_points: sampling points per query and head, over all maps.
        element_size: bytes per element of an activation.
    """
    per_query = width * (num_points * _FLOAT + element_size) + num_heads * num_points * (2 * _FLOAT + element_size)
    return queries * per_query + rows * width * _FLOAT


def _pixel_decoder(model: ModelConfig, decoder: DecoderConfig, element_size: int) -> int:
    """Returns the bytes of activations that autograd keeps for the pixel decoder, without the input maps."""
    width, coarser = decoder.hidden_size, _coarser(model)
    # Per layer and cell: the inputs of three linear layers and two norms, and the FFN's ReLU.
    layer = coarser * (5 * width + decoder.pixel_ffn_hidden_size) * element_size
    layer += _deformable(coarser, coarser, width, decoder.num_heads, _PIXEL_POINTS, element_size)
    # The inputs of the projections' norms, the last rows, and five maps of stride 4.
    around = width * (2 * coarser + 5 * _cells(model, 4)) * element_size
    return decoder.num_pixel_layers * layer + around


def _query_decoder(model: ModelConfig, decoder: DecoderConfig, element_size: int) -> int:
    """Returns the bytes of activations that autograd keeps for the query decoder.

    The first layer attends to the feature map of stride 32, the second to that of stride 16, and the third to that of
    stride 8. Later layers repeat this order.
    """
    width, queries, elements = decoder.hidden_size, decoder.num_queries, 0
    for number in range(decoder.num_query_layers):
        cells = _cells(model, _STRIDES[::-1][number % 3])
        # Keys and values before and after their projections, the attention's weights, and the queries' own layers.
        elements += 4 * width * cells + decoder.num_heads * queries * (cells + 2 * queries)
        elements += queries * (15 * width + decoder.ffn_hidden_size)
    return elements * element_size
