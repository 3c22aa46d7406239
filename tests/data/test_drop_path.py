"""Tests stochastic depth: correct rates, and equal draws under every layout."""

import torch

from beit3_ds.data.drop_path import Slot, draw_drop_path


def test_no_rate_draws_nothing() -> None:
    assert draw_drop_path(0.0, 4, 1, 0, [Slot("images", 0)]) is None


def test_rates_grow_linearly_and_keep_the_mean() -> None:
    factors = draw_drop_path(0.4, 5, 1, 0, [Slot("images", i) for i in range(4000)])
    assert factors is not None
    assert factors.shape == (4000, 5, 2)
    assert factors.dtype == torch.float32
    rates = torch.linspace(0, 0.4, 5)[:, None].expand(5, 2)
    torch.testing.assert_close((factors == 0).float().mean(0), rates, atol=0.03, rtol=0)
    torch.testing.assert_close(factors.mean(0), torch.ones(5, 2), atol=0.05, rtol=0)  # catches a missing 1 / (1 - rate)
    both = (factors[:, 4] == 0).all(dim=1).float().mean()
    assert 0.13 < both < 0.19  # catches one draw for both branches (0.4)


def test_a_slot_draws_the_same_in_any_company() -> None:
    slots = [Slot(stream, i) for stream in ("images", "pairs") for i in range(6)]
    together = draw_drop_path(0.9, 4, 1, 3, slots)
    assert together is not None
    apart = [draw_drop_path(0.9, 4, 1, 3, [slot]) for slot in slots]
    assert torch.equal(together, torch.cat([row for row in apart if row is not None]))  # catches one generator a batch
    assert len({tuple(row.flatten().tolist()) for row in together}) > 8  # catches draws that ignore the slot
    later = draw_drop_path(0.9, 4, 1, 4, slots)
    assert later is not None
    assert not torch.equal(together, later)  # catches draws that ignore the step


def test_an_empty_batch_has_no_rows() -> None:
    factors = draw_drop_path(0.1, 4, 1, 0, [])
    assert factors is not None
    assert factors.shape == (0, 4, 2)


def test_sequences_of_a_sample_draw_apart() -> None:
    first, second = Slot("pairs", 3), Slot("pairs", 3, 1)
    both = draw_drop_path(0.9, 24, 1, 0, [first, second])
    alone = draw_drop_path(0.9, 24, 1, 0, [first])
    assert both is not None and alone is not None
    assert torch.equal(both[:1], alone)  # catches draws that depend on the number of sequences
    assert not torch.equal(both[0], both[1])
