"""Wraps the pixel decoder and the query decoder of transformers' Mask2Former, without the backbone."""

# B images, D hidden of the maps, Q queries, C classes, H and W rows and columns of the finest map.

import importlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beit3_ds.config import ConfigError
from beit3_ds.model.vit_adapter.deformable_attention import ring_offsets
from beit3_ds.tasks.segmentation.config import DecoderConfig, SegmentationConfig

_MAPS = 4
_LEVELS, _POINTS = 3, 4  # of the pixel decoder's deformable attention, fixed in transformers


class QueryPredictions(NamedTuple):
    """Holds the queries' predictions after one decoder layer."""

    masks_BQHW: Tensor
    """Mask logits of each query on the finest map, (images, queries, rows, columns)."""
    classes_BQX: Tensor
    """Class logits of each query, (images, queries, classes + 1); the last class is "no object"."""


def mask2former_config(settings: SegmentationConfig) -> Any:
    """Returns the transformers configuration of Mask2Former's decoders and loss.

    Raises:
        ConfigError: if transformers is not installed.
    """
    decoder = settings.decoder
    return _transformers("transformers").Mask2FormerConfig(
        num_labels=settings.num_classes,
        feature_size=decoder.hidden_size,
        mask_feature_size=decoder.hidden_size,
        hidden_dim=decoder.hidden_size,
        encoder_feedforward_dim=decoder.pixel_ffn_hidden_size,
        dim_feedforward=decoder.ffn_hidden_size,
        encoder_layers=decoder.num_pixel_layers,
        decoder_layers=decoder.num_query_layers + 1,  # transformers counts the predictions before the first layer
        num_attention_heads=decoder.num_heads,
        num_queries=decoder.num_queries,
        dropout=0.0,
        class_weight=settings.class_weight,
        mask_weight=settings.mask_weight,
        dice_weight=settings.dice_weight,
        train_num_points=settings.num_points,
    )


def mask2former_parts() -> Any:
    """Returns the transformers module that contains Mask2Former's classes.

    Raises:
        ConfigError: if transformers or scipy is not installed.
    """
    _transformers("scipy.optimize")
    return _transformers("transformers.models.mask2former.modeling_mask2former")


def _transformers(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"segmentation: Mask2Former needs transformers and scipy, and importing {name} failed ({error}). Install "
            "them with `pip install .[segmentation]`."
        ) from None


class MaskDecoder(nn.Module):
    """Predicts masks and classes of an image from four feature maps; each of a fixed number of queries predicts one
    mask (Mask2Former).

    The pixel decoder mixes the three coarser maps by deformable attention. The finest of these three is then enlarged
    and added to the finest map. In each layer of the query decoder, a query attends only to cells within the mask that
    the previous layer predicted for the query. There is no dropout.

    With bf16 or fp16 parameters, forward runs under autocast. On a GPU, the sampling locations of deformable attention
    are then float32, because half precision would be too coarse. On a CPU, the locations are in half precision, and so
    less exact.
    """

    def __init__(self, settings: SegmentationConfig, channels: int) -> None:
        """Builds the pixel decoder and the query decoder with uninitialised parameters.

        Args:
            settings: the task's settings.
            channels: number of channels; equal for all four feature maps that `forward` takes.
        """
        super().__init__()
        parts, config = mask2former_parts(), mask2former_config(settings)
        self.pixels = parts.Mask2FormerPixelDecoder(config, feature_channels=[channels] * _MAPS)
        _name_norms(self.pixels)
        self.queries = parts.Mask2FormerTransformerModule(in_features=config.feature_size, config=config)
        self.classes = nn.Linear(config.hidden_dim, settings.num_classes + 1)

    def forward(self, maps: Sequence[Tensor]) -> list[QueryPredictions]:
        """Returns the queries' predictions before the first layer and after each layer, float32.

        Args:
            maps: four maps with 1/4, 1/8, 1/16 and 1/32 of the image's height and width, each (images, channels, rows,
                columns); there may be no images.
        """
        count, device = len(maps[0]), maps[0].device
        if not count:
            # transformers' modules do not accept zero images, but ZeRO-3 needs every parameter in every pass.
            maps = [of.new_zeros(1, *of.shape[1:]) + of.sum() for of in maps]
        dtype = self.classes.weight.dtype
        with torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            decoded = self.pixels(list(maps))
            output = self.queries(
                multi_scale_features=decoded.multi_scale_features, mask_features=decoded.mask_features
            )
            classes = [self.classes(hidden.transpose(0, 1)) for hidden in output.intermediate_hidden_states]
        return [
            QueryPredictions(masks_BQHW[:count].float(), classes_BQX[:count].float())
            for masks_BQHW, classes_BQX in zip(output.masks_queries_logits, classes, strict=True)
        ]


def _name_norms(pixels: nn.Module) -> None:
    """Gives names to the convolutions and norms in `nn.Sequential` modules, which have numbers. Weight decay recognises
    norms by their names.
    """
    for module in pixels.modules():
        if isinstance(module, nn.Sequential) and isinstance(module[1], nn.GroupNorm):
            named = zip(("conv", "norm", "relu"), list(module), strict=False)
            module._modules = OrderedDict(named)


def decoder_initial_value(
    name: str, shape: torch.Size, config: DecoderConfig, generator: torch.Generator
) -> Tensor | None:
    """Returns the initial value of a parameter of `MaskDecoder`; None for norms, which start with weight 1 and bias 0.

    Follows the original code of Mask2Former. The query decoder's layers and the projections of deformable attention are
    Xavier-uniform. In deformable attention, the layers that compute sampling offsets and attention weights have weight
    0, and the offsets' bias is `ring_offsets`. Queries and level vectors are standard normal. The mask embedder is
    uniform, like torch's linear layers. Other weights are normal with standard deviation 0.02. All other biases are 0.

    Args:
        name: name of the parameter within the decoder, such as `queries.decoder.layers.0.fc1.weight`.
        shape: shape of the parameter.
        config: sizes of the decoder.
        generator: random generator.
    """
    value = torch.empty(shape)
    if name.endswith("sampling_offsets.bias"):
        return ring_offsets(config.num_heads, _LEVELS, _POINTS)
    if ".sampling_offsets." in name or ".attention_weights." in name:
        return value.zero_()
    if ".mask_embedder." in name:  # torch's initial values of linear layers: uniform up to 1 / sqrt(inputs)
        bound = 1 / math.sqrt(config.hidden_size)
        return value.uniform_(-bound, bound, generator=generator)
    if "norm" in name:
        return None
    if name.endswith("bias"):
        return value.zero_()
    if any(part in name for part in ("level_embed", "queries_embedder", "queries_features")):
        return value.normal_(generator=generator)
    if ".decoder.layers." in name or "_proj." in name:
        return nn.init.xavier_uniform_(value, generator=generator)
    return value.normal_(std=0.02, generator=generator)
