"""Held-out batches: all samples once, the same for every layout and at every pass."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ConfigError
from beit3_ds.data.heldout import build_heldout_batches
from beit3_ds.tokenizers.text import TextTokenizer
from tests.data.conftest import BuildConfig, WriteTar


def _names(batches: Iterable[PackedBatch]) -> list[str]:
    return [name for batch in batches for name in batch.sample_names]


@pytest.mark.parametrize("size", [1, 2, 4, 3, 7])
def test_ranks_share_all_samples_in_equally_many_batches(
    build_config: BuildConfig, tokenizer: TextTokenizer, size: int
) -> None:
    config = build_config(training={"eval_samples": 15})
    ranks = [build_heldout_batches(config, tokenizer, rank, size) for rank in range(size)]
    assert len({len(rank) for rank in ranks}) == 1  # catches collectives that wait for a rank without a batch
    assert all(len(list(rank)) == len(rank) for rank in ranks)
    names = [name for rank in ranks for name in _names(rank)]
    assert len(names) == len(set(names))  # catches shares that overlap
    assert sum("images-" in name for name in names) == 15
    assert sum("pairs-" in name for name in names) == 13  # fewer than eval_samples
    assert sum("text.txt" in name for name in names) == 15
    for rank in ranks:
        for batch in rank:
            assert batch.num_images <= -(-4 // size)
            assert batch.drop_path is None


def test_masked_counts_do_not_depend_on_the_layout(build_config: BuildConfig, tokenizer: TextTokenizer) -> None:
    config = build_config()
    one = list(build_heldout_batches(config, tokenizer, 0, 1))
    two = [batch for rank in range(2) for batch in build_heldout_batches(config, tokenizer, rank, 2)]

    def masks(batches: Iterable[PackedBatch]) -> dict[str, list[bool]]:
        named: dict[str, list[bool]] = {}
        for batch in batches:
            named |= dict(zip(batch.sample_names, batch.patch_mask.tolist(), strict=False))
        return named

    assert masks(one) == masks(two)  # catches masks seeded by the batch


def test_every_pass_yields_the_same(build_config: BuildConfig, tokenizer: TextTokenizer) -> None:
    batches = build_heldout_batches(build_config(), tokenizer, 0, 1)
    first, second = list(batches), list(batches)
    again = list(build_heldout_batches(build_config(), tokenizer, 0, 1))
    for a, b, c in zip(first, second, again, strict=True):
        assert a is b  # prepared once
        # catches views or masks that change between evaluations
        assert torch.equal(a.pixels, c.pixels)
        assert torch.equal(a.patch_mask, c.patch_mask)
        assert torch.equal(a.token_ids, c.token_ids)


def test_streams_without_heldout_files_are_absent(build_config: BuildConfig, tokenizer: TextTokenizer) -> None:
    absent = {"train": ["unused"], "samples_per_step": 4}
    config = build_config(data={"images": absent, "pairs": absent})
    assert all(batch.num_images == batch.num_pairs == 0 for batch in build_heldout_batches(config, tokenizer, 0, 1))
    nothing = build_heldout_batches(
        build_config(data=dict.fromkeys(("images", "pairs", "texts"), absent)), tokenizer, 0, 1
    )
    assert list(nothing) == []


def test_a_stream_that_is_not_trained_can_be_evaluated(build_config: BuildConfig, tokenizer: TextTokenizer) -> None:
    batches = list(build_heldout_batches(build_config(images=0), tokenizer, 0, 1))
    assert sum(batch.num_images for batch in batches) == 22


def test_a_broken_record_stops_with_its_name(
    build_config: BuildConfig, tokenizer: TextTokenizer, tmp_path: Path, write_tar: WriteTar, png: bytes
) -> None:
    shard = write_tar(tmp_path / "s.tar", {"good.png": png, "bad.png": b"no image"})
    with pytest.raises(ConfigError, match=r"s\.tar:bad: broken image"):
        list(build_heldout_batches(build_config(files={"images": shard}), tokenizer, 0, 1))
