"""Tests which GPU architecture a device counts as."""

import pytest
import torch

from beit3_ds.kernels.triton import architecture
from beit3_ds.kernels.triton.ahead_of_time import ARCHITECTURES
from beit3_ds.kernels.triton.architecture import NUM_MULTIPROCESSORS, architecture_of


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100)])
def test_every_device_has_an_architecture(
    capability: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(architecture, "_architecture_of_gpu", architecture._architecture_of_gpu.__wrapped__)
    assert architecture_of(torch.device("cuda", 0)) == expected


def test_kernels_are_compiled_for_every_architecture() -> None:
    assert architecture_of(torch.device("cpu")) == 80
    assert set(ARCHITECTURES) == set(NUM_MULTIPROCESSORS)
