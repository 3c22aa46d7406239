"""Emulates a machine with two GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Emulates two GPUs; the last entry of the returned list is the index of the current GPU, initially 0."""
    current = [0]

    @contextmanager
    def switch(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", switch)
    return current
