"""Tests that the reference generates the same captions as this project, so that their times are comparable."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from beit3_ds.benchmarks.finetune.cases import case_config
from beit3_ds.benchmarks.finetune.decoding import reference_captions
from beit3_ds.benchmarks.finetune.reference import ReferenceModel
from beit3_ds.model import TaskModel
from beit3_ds.model.generation import BeamSearch, generate
from beit3_ds.tasks.captioning.head import CaptionHead
from beit3_ds.weights.export import export_weights
from tests.weights.models import ModelReader


@pytest.mark.parametrize(("beams", "length"), [(1, 9), (3, 9), (3, 12)])
def test_both_sides_find_the_same_words(beams: int, length: int, tmp_path: Path) -> None:
    config = replace(case_config("captioning", "tiny", 32, num_layers=2).model, text_vocab_size=64)
    ours = TaskModel(CaptionHead, config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():  # likely words must depend on the image
            parameter.normal_(0, 0.1, generator=generator)
            parameter += "norm.weight" in name
    export_weights(ModelReader(ours), tmp_path / "weights.pth", format="unilm-dual")
    theirs = ReferenceModel("captioning", config).eval()
    theirs.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True)["model"])
    pixels = torch.randn(5, 3, 32, 32, generator=generator)
    tokens = SimpleNamespace(bos_id=0, eos_id=2, mask_id=theirs.mask_id)
    found = generate(ours, pixels, tokens, BeamSearch(num_beams=beams, max_length=length))
    expected = reference_captions(theirs, pixels, beams, 0.6, length)
    assert [list(caption.ids) for caption in found] == expected
    assert len({tuple(ids) for ids in expected}) > 1
