"""Checks the parameter counts of the giant models for detection and segmentation, built on the meta device."""

from collections import Counter

import pytest
import torch

from beit3_ds.config import load_run_config
from beit3_ds.tasks.build import build_task
from tests.test_architecture import ROOT

PARTS = {
    "detection_giant": {
        "embeddings": 10.09,
        "blocks": 1010.29,
        "pyramid": 12.28,
        "proposals": 1.18,
        "boxes": 45.88,
        "masks": 2.64,
    },
    "segmentation_giant": {"embeddings": 5.5, "blocks": 1010.01, "adapter": 40.75, "decoder": 241.23},
}
"""Millions of parameters per part; docs/dense.md has the same numbers."""


@pytest.mark.parametrize("name", PARTS)
def test_whole_models_are_built(name: str) -> None:
    """Catches parts that no task uses, such as experts of other modalities, and outdated numbers in docs/dense.md."""
    with torch.device("meta"):
        model = build_task(load_run_config(ROOT / "ds_configs" / f"{name}.json")).build_model()
    counts: Counter[str] = Counter()
    for parameter_name, parameter in model.named_parameters():
        counts[parameter_name.removeprefix("heads.").split(".")[0]] += parameter.numel()
    assert {part: round(count / 1e6, 2) for part, count in counts.items()} == PARTS[name]
    table = (ROOT / "docs" / "dense.md").read_text()
    for part, millions in PARTS[name].items():
        assert f"{part} {millions:.2f}" in table
