"""Compares the predicted memory of the segmentation head with the tensors that autograd saves."""

import pytest
import torch
from torch import Tensor, nn

from beit3_ds.config import ModelConfig
from beit3_ds.config.dense import DenseConfig
from beit3_ds.model.dense.pyramid import SimpleFeaturePyramid
from beit3_ds.model.vit_adapter import AdapterConfig, ViTAdapter
from beit3_ds.tasks.segmentation.config import DecoderConfig, SegmentationConfig
from beit3_ds.tasks.segmentation.mask_decoder import MaskDecoder
from beit3_ds.tasks.segmentation.memory import crop_memory
from tests.kept_memory import kept_bytes

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=96,
    ffn_hidden_size=96,
    num_attention_heads=4,
    patch_size=16,
    image_size=128,
    num_vision_language_layers=0,
    inputs=("images",),
    dense=DenseConfig(),
    final_norm=False,
)
DECODER = DecoderConfig(
    hidden_size=64,
    ffn_hidden_size=80,
    pixel_ffn_hidden_size=96,
    num_heads=4,
    num_pixel_layers=2,
    num_query_layers=3,
    num_queries=10,
)
SIDE = MODEL.image_size // MODEL.patch_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adapter", "recomputed adapter", "pyramid"])
def test_modelled_memory_is_what_autograd_keeps(kind: str, dtype: torch.dtype) -> None:
    settings = SegmentationConfig(
        num_classes=7, decoder=DECODER, adapter=None if kind == "pyramid" else AdapterConfig(num_heads=4)
    )
    recomputes = kind == "recomputed adapter"
    pixels = torch.randn(1, 3, MODEL.image_size, MODEL.image_size, dtype=dtype)
    rows = torch.randn(1, SIDE**2, MODEL.hidden_size, dtype=dtype, requires_grad=True)
    channels = DECODER.hidden_size if settings.adapter is None else MODEL.hidden_size
    decoder = MaskDecoder(settings, channels)
    pyramid = SimpleFeaturePyramid(MODEL.hidden_size, channels)
    adapter = ViTAdapter(settings.adapter or AdapterConfig(), MODEL.hidden_size, 4, recomputes=recomputes)
    head = nn.ModuleList([decoder, pyramid, adapter])
    for parameter in head.parameters():
        nn.init.normal_(parameter, 0, 0.05)
    head.to(dtype)

    def forward() -> object:
        if settings.adapter is None:
            maps = pyramid(rows.transpose(1, 2).unflatten(2, (SIDE, SIDE)))
            return decoder([maps[name] for name in ("4", "8", "16", "32")])
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            return decoder(adapter(pixels, rows, (SIDE, SIDE), run_blocks))

    def run_blocks(x_BND: Tensor, blocks: range) -> Tensor:
        return x_BND * 1.5

    modelled = crop_memory(MODEL, settings, dtype.itemsize, recomputes=recomputes)
    measured = kept_bytes(head, forward, [pixels])
    assert modelled == pytest.approx(measured, rel=0.02)
