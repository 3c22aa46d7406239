"""Tests the usage statistics of codes."""

import math

import pytest
import torch

from beit3_ds.tasks.visual_tokenizer.code_usage import CodeUsage, measure_code_usage


def test_code_usage_is_exact() -> None:
    usage = measure_code_usage([torch.tensor([[0, 1], [1, 1]]), torch.tensor([[3, 3], [1, 1]])], 6)
    shares = (1 / 8, 5 / 8, 2 / 8)
    assert usage.num_codes == 3
    assert usage.perplexity == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))


def test_few_patches_say_nothing_about_dead_codes() -> None:
    few = CodeUsage(num_codes=3, codebook_size=100, perplexity=3, num_seen=1599)
    enough = CodeUsage(num_codes=3, codebook_size=100, perplexity=3, num_seen=1600)
    alive = CodeUsage(num_codes=50, codebook_size=100, perplexity=40, num_seen=1600)
    assert (few.is_low, enough.is_low, alive.is_low) == (False, True, False)
