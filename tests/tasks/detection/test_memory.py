"""Compares the predicted memory of the detection head with the tensors that autograd saves."""

import dataclasses

import pytest
import torch

from beit3_ds.tasks.detection.head import DetectionHead
from beit3_ds.tasks.detection.memory import image_memory
from beit3_ds.tasks.detection.packing import pack
from tests.kept_memory import kept_bytes
from tests.tasks.detection.test_head import MODEL, NUM_TERMS, SETTINGS, _sample


@pytest.mark.parametrize(("width", "channels", "num_boxes"), [(64, 48, 32), (256, 48, 8)])
@pytest.mark.parametrize(("masks", "dtype"), [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)])
def test_modelled_memory_is_what_autograd_keeps(
    width: int, channels: int, num_boxes: int, masks: bool, dtype: torch.dtype
) -> None:
    """Compares bytes for several sizes; in the second one the pyramid takes most memory.

    With 60 objects, a quarter of the sampled boxes are positive. In bf16, norms keep their statistics in bf16 on a CPU
    and in float32 on a GPU.
    """
    model = dataclasses.replace(MODEL, hidden_size=width, final_norm=False)
    settings = dataclasses.replace(
        SETTINGS,
        pyramid_channels=channels,
        sampled_boxes=num_boxes,
        proposals=300,
        proposals_per_level=300,
        masks=masks,
    )
    head = DetectionHead(model, settings, settings.num_classes)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    batch = pack([_sample(0, (96, 96), 60)], None, {}, model=model, num_terms=NUM_TERMS, embeds=False)
    head.to(dtype)
    rows = torch.randn(36, width, dtype=dtype, requires_grad=True)
    measured = kept_bytes(head, lambda: head(rows, batch, True))
    assert image_memory(model, settings, dtype.itemsize) == pytest.approx(measured, rel=0.03)
