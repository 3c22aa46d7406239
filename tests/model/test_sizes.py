"""Compares parameter counts with table 2 of the paper and with the released models."""

import re

import pytest
import torch
from torch import nn

from beit3_ds.config import MODEL_SIZES, ModelConfig
from beit3_ds.tasks.pretraining.model import PretrainingModel


def shapes_of(size: str, **changes: object) -> dict[str, nn.Parameter]:
    with torch.device("meta"):
        return dict(PretrainingModel(ModelConfig(**(MODEL_SIZES[size] | changes))).named_parameters())


def millions(parameters: dict[str, nn.Parameter], pattern: str) -> int:
    """Returns the number of elements of weight matrices whose names match a pattern, in millions."""
    return round(sum(p.numel() for name, p in parameters.items() if re.search(pattern, name) and p.dim() == 2) / 1e6)


def test_giant_is_the_papers() -> None:
    parameters = shapes_of("giant")
    assert millions(parameters, r"ffn\.fc\d\.weight_vision$") == 692
    assert millions(parameters, r"ffn\.fc\d\.weight_language$") == 692
    assert millions(parameters, r"ffn\.fc\d\.weight_vision_language$") == 52
    assert millions(parameters, r"attention\.\w_proj\.|attention\.out_proj\.") == 317
    total = sum(p.numel() for p in parameters.values())
    assert 1.85e9 < total < 1.95e9  # "1.9B"; catches a vision-language expert in every layer


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (("images",), 1011),
        (("texts",), 1100),
        (("images", "texts"), 1794),
        (("pairs",), 1742),
        (("images", "pairs", "texts"), 1846),
    ],
)
def test_parts_of_giant(inputs: tuple[str, ...], expected: int) -> None:
    """Checks the encoders in figure 3 of the paper, without heads."""
    parameters = shapes_of("giant", inputs=inputs)
    count = sum(p.numel() for name, p in parameters.items() if not name.startswith("heads."))
    assert round(count / 1e6) == expected


@pytest.mark.parametrize(("size", "backbone"), [("base", 220.99), ("large", 672.70)])
def test_decoupled_sizes_are_the_released_ones(size: str, backbone: float) -> None:
    """Compares sizes with the released models.

    Their position tables have 1024 text positions, and each table begins with two unused rows.
    """
    parameters = shapes_of(
        size, layout="decoupled", num_vision_language_layers=0, sub_layernorm=True, max_text_length=1022
    )
    unused = 2 * 2 * MODEL_SIZES[size]["hidden_size"]
    count = sum(p.numel() for name, p in parameters.items() if not name.startswith(("heads.mim", "heads.mlm")))
    assert round((count + unused) / 1e6, 2) == backbone
