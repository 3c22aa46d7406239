"""Tests the memory needed to load the vision encoder of a giant model, in a separate process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from beit3_ds.checkpoint.slices import TensorSlice
from beit3_ds.config import MODEL_SIZES, ModelConfig
from beit3_ds.tasks.pretraining.model import PretrainingModel
from beit3_ds.weights.export import export_weights

LOAD = """
import sys
import torch
from beit3_ds.benchmarks.peak_memory import peak_bytes
from beit3_ds.model import BEiT3

model = BEiT3.from_pretrained(sys.argv[1], inputs=("images",))
peak = peak_bytes()
with torch.no_grad():
    assert model.encode(torch.zeros(1, 3, 224, 224)).images.isfinite().all()
print(sum(p.numel() for p in model.parameters()), sum(p.nbytes for p in model.parameters()), peak)
"""


class RandomWeights:
    """Draws the tensors of a model when they are read, so the whole model is never in memory."""

    step, task = 0, None

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        with torch.device("meta"):
            self._shapes = {name: p.shape for name, p in PretrainingModel(model).named_parameters()}

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> torch.Size:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, name: str, part: TensorSlice | None = None) -> Tensor:
        shape = self._shapes[name] if part is None else part.shape
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03)


@pytest.mark.slow
def test_memory_of_a_vision_encoder(tmp_path: Path) -> None:
    """Measures the whole process including torch; catches unneeded experts and file pages that stay in memory."""
    weights = RandomWeights(ModelConfig(**MODEL_SIZES["giant"]))
    export_weights(weights, tmp_path / "giant.safetensors")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "giant.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    count, num_bytes, peak = map(int, result.stdout.split())
    (tmp_path / "giant.safetensors").unlink()
    print(f"{count:,} parameters of {num_bytes / 1e9:.2f} GB; peak {peak / 1e9:.2f} GB, {peak / num_bytes:.3f} times")
    assert 1.01e9 < count <= 1.02e9
    assert peak <= 1.15 * num_bytes
