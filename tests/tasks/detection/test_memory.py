"""Compares the modelled memory of the detection head with the tensors that autograd keeps."""

import dataclasses

import pytest
import torch
from torch import Tensor

from beit3_ds.tasks.detection.head import DetectionHead
from beit3_ds.tasks.detection.memory import image_memory
from beit3_ds.tasks.detection.packing import pack
from tests.tasks.detection.test_head import MODEL, NUM_TERMS, SETTINGS, _sample


def kept_bytes(head: DetectionHead, num_objects: int) -> int:
    """Returns the bytes of all storages that the forward pass over one image keeps, parameters left out."""
    batch = pack([_sample(0, (96, 96), num_objects)], None, {}, model=MODEL, num_terms=NUM_TERMS, embeds=False)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in head.parameters()}
    kept = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    rows = torch.randn(36, head.pyramid.maps["16"].lateral.in_channels, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        sums = head(rows, batch, True)
    assert sums.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(("width", "channels", "num_boxes"), [(64, 16, 64), (256, 32, 8)])
@pytest.mark.parametrize("masks", [True, False])
def test_modelled_memory_is_what_autograd_keeps(width: int, channels: int, num_boxes: int, masks: bool) -> None:
    """The second case is mostly the pyramid. 60 objects make a quarter of the drawn boxes positive."""
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
    assert image_memory(model, settings, 4) == pytest.approx(kept_bytes(head, 60), rel=0.03)
