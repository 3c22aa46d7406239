"""Tests that a checkpoint saved under one layout loads with equal content under every other layout."""

from pathlib import Path

import pytest
import torch

from tests.checkpoint.resharding import Saved, Setup, load_and_resume, save_and_resume
from tests.ranks import run_ranks
from tests.training.layouts import Layout

FEW = [
    Setup(Layout(1, 1, 1), 0),
    Setup(Layout(1, 1, 2), 3),
    Setup(Layout(2, 1, 2, sequence_parallel=True), 2),
    Setup(Layout(1, 2, 2, interleaved=True), 1),
]
"""A few setups that include every ZeRO stage and every parallel axis."""
ALL = [
    *FEW,
    Setup(Layout(1, 1, 2), 1),
    Setup(Layout(2, 1, 1), 0),
    Setup(Layout(1, 2, 1), 3),
    Setup(Layout(2, 2, 2), 3),
    Setup(Layout(4, 2, 1, sequence_parallel=True), 1),
    Setup(Layout(2, 4, 1), 2),
]
NARROW = [Setup(Layout(1, 1, 2), stage, bf16=True) for stage in (0, 1, 2, 3)]
MINUTES = 60


def check_pairs(sources_of: dict[Setup, list[Setup]], root: Path) -> None:
    """Saves a checkpoint under every setup, then loads the checkpoints of its sources."""
    saved = {setup: run_ranks(save_and_resume, setup.layout.num_ranks, setup, root) for setup in sources_of}
    for setup, sources in sources_of.items():
        ranks = run_ranks(load_and_resume, setup.layout.num_ranks, setup, root, sources, timeout=20 * MINUTES)
        for source, loaded in zip(sources, zip(*ranks, strict=True), strict=True):
            check_pair(source, saved[source], setup, list(loaded))


def all_pairs(setups: list[Setup]) -> dict[Setup, list[Setup]]:
    return dict.fromkeys(setups, setups)


def check_pair(source: Setup, saved: list[Saved], target: Setup, loaded: list[Saved]) -> None:
    """Checks that loaded state is equal bit for bit; for equal layouts, later losses must be equal too."""
    where = f"saved under {source}, loaded under {target}"
    expected = whole_model(saved)
    found = whole_model(loaded)
    assert found.keys() == expected.keys(), where
    for name, tensor in expected.items():
        if name.startswith("used") and source.bf16 != target.bf16:
            continue
        assert torch.equal(found[name], tensor), f"{where}: {name}"
    if source.bf16 or target.bf16:
        assert source != target or all(map(torch.equal, loaded[0].losses, saved[0].losses)), where
        return
    for after, before in zip(loaded[0].losses, saved[0].losses, strict=True):
        tolerance = 0 if source == target else 1e-5
        torch.testing.assert_close(after, before, rtol=tolerance, atol=0, msg=lambda text: f"{where}: {text}")


def whole_model(ranks: list[Saved]) -> dict[str, torch.Tensor]:
    """Returns the tensors of all stages, after checking that ranks agree on tensors that they share."""
    whole: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for name, tensor in rank.tensors.items():
            assert name not in whole or torch.equal(whole[name], tensor), f"ranks disagree about {name}"
            whole[name] = tensor
    return whole


def test_some_pairs(tmp_path: Path) -> None:
    """Resumes every layout from its own checkpoint and from that of another layout."""
    check_pairs({setup: [setup, other] for setup, other in zip(FEW, FEW[1:] + FEW[:1], strict=True)}, tmp_path)


@pytest.mark.slow
def test_all_pairs(tmp_path: Path) -> None:
    check_pairs(all_pairs(ALL), tmp_path)
    print(f"{len(ALL) ** 2} pairs of {len(ALL)} layouts")


def test_bf16_pair(tmp_path: Path) -> None:
    """Checks a bf16 run: master weights and moments are float32, parameters are rounded master weights."""
    check_pairs({NARROW[1]: [NARROW[3]], NARROW[3]: [NARROW[3]]}, tmp_path)


@pytest.mark.slow
def test_all_bf16_pairs(tmp_path: Path) -> None:
    """Checks all pairs with bf16 on one side or on both."""
    check_pairs(all_pairs([*NARROW, FEW[1]]), tmp_path)
