"""Compares the packed model with a plain padded one, and tests properties that parallel training needs."""

import dataclasses
import itertools

import pytest
import torch

from beit3_ds.config import INPUT_KINDS, ActivationCheckpointing, ModelConfig
from beit3_ds.model import BEiT3, initialize_parameters
from beit3_ds.tasks.pretraining.model import PretrainingModel
from tests.batches import decoupled, random_batch, small_model_config
from tests.model.plain_beit3 import plain_losses

LAYOUTS = {
    "shared": small_model_config(),
    "shared-sub-ln": small_model_config(sub_layernorm=True),
    "no-vl": small_model_config(num_vision_language_layers=0),
    "decoupled": decoupled(),
}
MIXES = {"images": (3, 0, 0), "texts": (0, 0, 3), "pairs": (0, 3, 0), "all": (2, 2, 3)}


def build(
    config: ModelConfig, dtype: torch.dtype = torch.float64, recompute: ActivationCheckpointing = "none"
) -> BEiT3:
    model = PretrainingModel(config, activation_checkpointing=recompute)
    initialize_parameters(model, config, seed=3)
    with torch.no_grad():  # biases and norms differ from 0 and 1, so a missing one changes results
        for i, parameter in enumerate(model.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return model.to(dtype)


@pytest.mark.parametrize("captions", ["", "causal"])
@pytest.mark.parametrize("drop_path", [False, True], ids=["", "drop-path"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_equals_plain(layout: str, mix: str, drop_path: bool, captions: str) -> None:
    config = LAYOUTS[layout]
    model = build(config)
    batch = random_batch(config, *MIXES[mix], drop_path=drop_path)
    batch = dataclasses.replace(batch, causal_captions=captions == "causal")
    factors = torch.tensor([0.3, 0.5, 0.7, 1.1], dtype=torch.float64)
    output = model(batch, factors)
    output.total.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    parameters = dict(model.named_parameters())
    sums = plain_losses(parameters, config, batch)
    (sums * factors).sum().backward()

    torch.testing.assert_close(output.sums, sums.detach())
    for name, parameter in parameters.items():
        # The plain model leaves unused experts without a gradient; the packed one must give zeros (ZeRO-3 needs them).
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(packed[name], expected, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mix", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_every_parameter_takes_part(mix: tuple[int, int, int]) -> None:
    """Catches a parameter without gradient in some micro-batch, which corrupts or hangs ZeRO-3."""
    kinds = tuple(kind for kind, count in zip(INPUT_KINDS, mix, strict=True) if count) or INPUT_KINDS
    for config in [*LAYOUTS.values(), *(dataclasses.replace(c, inputs=kinds) for c in LAYOUTS.values())]:
        model = build(config, torch.float32)
        model(random_batch(config, *mix), torch.ones(4)).total.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("sub_layernorm", [False, True])
def test_activation_checkpointing_changes_nothing(sub_layernorm: bool) -> None:
    config = small_model_config(sub_layernorm=sub_layernorm)
    batch, gradients = random_batch(config, 2, 2, 2, drop_path=True), []
    recipes: list[ActivationCheckpointing] = ["none", "full"]
    for recompute in recipes:
        model = build(config, recompute=recompute)
        model(batch, torch.ones(4)).total.backward()
        gradients.append([p.grad for p in model.parameters()])
    for expected, *others in zip(*gradients, strict=True):
        assert all(torch.equal(other, expected) for other in others)


def test_logits_belong_to_the_losses() -> None:
    config = small_model_config()
    model, batch = build(config, torch.float32), random_batch(small_model_config(), 2, 2, 2)
    logits = model(batch, None)
    text = torch.nn.functional.cross_entropy(logits.text, batch.targets["target_ids"], reduction="sum")
    sums = model(batch, torch.ones(4)).sums
    torch.testing.assert_close(text, sums[1] + sums[3])


def test_samples_do_not_see_each_other() -> None:
    """Catches an attention range that includes neighbouring rows: changing one text must not change other losses."""
    config = small_model_config()
    model, batch = build(config), random_batch(config, 1, 1, 2)
    changed = batch.token_ids.clone()
    last_text = sum(batch.caption_lengths) + batch.text_lengths[0]
    changed[last_text:] = (changed[last_text:] + 1) % config.text_vocab_size
    altered = random_batch(config, 1, 1, 2)
    object.__setattr__(altered, "token_ids", changed)
    before, after = model(batch, torch.ones(4)).sums, model(altered, torch.ones(4)).sums
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])
    assert before[1] != after[1]


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_causal_captions_do_not_leak(layout: str) -> None:
    """Changes later words one by one; image rows, earlier words and other sequences must stay unchanged."""
    config = LAYOUTS[layout]
    model, batch = build(config), dataclasses.replace(random_batch(config, 1, 2, 1), causal_captions=True)
    before = BEiT3.forward(model, dataclasses.replace(batch, head_rows=None, head_row_counts=()))
    first_row = batch.boundaries[1]
    for token in range(sum(batch.caption_lengths)):
        ids = batch.token_ids.clone()
        ids[token] = (ids[token] + 1) % config.text_vocab_size
        changed = dataclasses.replace(batch, token_ids=ids, head_rows=None, head_row_counts=())
        rows = (BEiT3.forward(model, changed) != before).any(1).nonzero().flatten().tolist()
        stops = itertools.accumulate(batch.caption_lengths)
        stop = next(stop for stop in stops if stop > token)
        assert rows == list(range(first_row + token, first_row + stop))
