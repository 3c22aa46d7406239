"""Tests validation batches: each sample once, equal for every layout and on every pass."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ConfigError, RunConfig, SourceConfig
from beit3_ds.data.validation import choose_samples, divide_by_size
from beit3_ds.tokenizers.text import TextTokenizer
from tests.data.conftest import BuildConfig, WriteTar
from tests.tasks.pretraining.samples import open_validation_batches


def _names(batches: Iterable[PackedBatch]) -> list[str]:
    return [name for batch in batches for name in batch.sample_names]


@pytest.mark.parametrize("size", [1, 2, 4, 3, 7])
def test_ranks_share_all_samples_in_equally_many_batches(
    build_config: BuildConfig, tokenizer: TextTokenizer, size: int
) -> None:
    config = build_config(training={"eval_samples": 15})
    ranks = [open_validation_batches(config, tokenizer, rank, size) for rank in range(size)]
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
    one = list(open_validation_batches(config, tokenizer, 0, 1))
    two = [batch for rank in range(2) for batch in open_validation_batches(config, tokenizer, rank, 2)]

    def masks(batches: Iterable[PackedBatch]) -> dict[str, list[bool]]:
        named: dict[str, list[bool]] = {}
        for batch in batches:
            named |= dict(zip(batch.sample_names, batch.patch_mask.tolist(), strict=False))
        return named

    assert masks(one) == masks(two)  # catches masks seeded by the batch


def test_every_pass_yields_the_same(build_config: BuildConfig, tokenizer: TextTokenizer) -> None:
    batches = open_validation_batches(build_config(), tokenizer, 0, 1)
    first, second = list(batches), list(batches)
    again = list(open_validation_batches(build_config(), tokenizer, 0, 1))
    for a, b, c in zip(first, second, again, strict=True):
        assert a is b  # prepared once
        # catches views or masks that change between evaluations
        assert torch.equal(a.pixels, c.pixels)
        assert torch.equal(a.patch_mask, c.patch_mask)
        assert torch.equal(a.token_ids, c.token_ids)


def test_streams_without_validation_files_are_absent(build_config: BuildConfig, tokenizer: TextTokenizer) -> None:
    absent = {"train": ["unused"], "samples_per_step": 4}
    config = build_config(data={"images": absent, "pairs": absent})
    assert all(batch.num_images == batch.num_pairs == 0 for batch in open_validation_batches(config, tokenizer, 0, 1))
    nothing = open_validation_batches(
        build_config(data=dict.fromkeys(("images", "pairs", "texts"), absent)), tokenizer, 0, 1
    )
    assert list(nothing) == []


def test_a_stream_that_is_not_trained_can_be_evaluated(build_config: BuildConfig, tokenizer: TextTokenizer) -> None:
    batches = list(open_validation_batches(build_config(images=0), tokenizer, 0, 1))
    assert sum(batch.num_images for batch in batches) == 22


def test_a_broken_record_stops_with_its_name(
    build_config: BuildConfig, tokenizer: TextTokenizer, tmp_path: Path, write_tar: WriteTar, png: bytes
) -> None:
    shard = write_tar(tmp_path / "s.tar", {"good.png": png, "bad.png": b"no image"})
    with pytest.raises(ConfigError, match=r"s\.tar:bad: broken image"):
        list(open_validation_batches(build_config(files={"images": shard}), tokenizer, 0, 1))


def _fingerprints(config: RunConfig, tokenizer: TextTokenizer, size: int = 1) -> dict[str, tuple[object, ...]]:
    """Returns the targets of every validation sample on all ranks, by sample name."""
    found: dict[str, tuple[object, ...]] = {}
    for rank in range(size):
        for batch in open_validation_batches(config, tokenizer, rank, size):
            texts = batch.token_ids.split([*batch.caption_lengths, *batch.text_lengths])
            num_pixels = batch.num_images + batch.num_pairs
            for number, name in enumerate(batch.sample_names):
                mask = tuple(batch.patch_mask[number].tolist()) if number < num_pixels else ()
                text = number - batch.num_images
                found[name] = (mask, tuple(texts[text].tolist()) if text >= 0 else ())
    return found


def test_the_validation_loss_asks_the_same_whatever_the_runs_seed(
    build_config: BuildConfig, tokenizer: TextTokenizer
) -> None:
    """Catches validation masks that depend on `training.seed`: they once moved text_mlm from 5.65 to 5.95."""
    base = {"eval_samples": 9, "validation_seed": 3}
    runs = [
        _fingerprints(build_config(training={**base, "seed": seed}), tokenizer, size)
        for seed, size in ((1, 1), (2, 1), (7, 3))
    ]
    assert runs[0] == runs[1] == runs[2]
    other = _fingerprints(build_config(training={**base, "validation_seed": 4}), tokenizer)
    assert other != runs[0]


def test_samples_are_spread_over_all_sources(
    build_config: BuildConfig, tokenizer: TextTokenizer, tmp_path: Path, write_tar: WriteTar, png: bytes
) -> None:
    """Catches a choice of the first samples in file order, which all belong to the first source."""
    sources = [write_tar(tmp_path / f"{n}.tar", {f"{i}.png": png for i in range(n)}) for n in (30, 10, 2)]
    config = build_config(training={"eval_samples": 10})
    images = dataclasses.replace(config.data.images, validation=tuple(SourceConfig(path=str(path)) for path in sources))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, images=images))
    for size in (1, 2, 3):
        ranks = [list(open_validation_batches(config, tokenizer, rank, size)) for rank in range(size)]
        assert len({len(rank) for rank in ranks}) == 1
        by_source: dict[int, list[str]] = {}
        for batch in (batch for rank in ranks for batch in rank if batch.num_images):
            names = batch.sample_names[: batch.num_images]
            by_source.setdefault(batch.sources["images"], []).extend(names)
        assert {source: len(names) for source, names in by_source.items()} == {0: 7, 1: 2, 2: 1}
        for source, names in by_source.items():
            assert all(str(sources[source]) in name for name in names)  # catches a batch of two sources
    keys = {int(name.rpartition(":")[2]) for name in by_source[0]}
    assert max(keys) >= 7  # catches the first ones of a source


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any), st.integers(1, 120), st.integers(0, 9))
def test_any_sources_give_their_shares(sizes: list[int], limit: int, seed: int) -> None:
    shares, total = divide_by_size(sizes, limit), sum(sizes)
    assert sum(shares) == min(limit, total)
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    if limit >= sum(size > 0 for size in sizes):
        assert all(share > 0 for share, size in zip(shares, sizes, strict=True) if size)
    chosen = choose_samples(sizes, limit, seed, "texts")
    assert [len(of_source) for of_source in chosen] == shares
    start = 0
    for of_source, size in zip(chosen, sizes, strict=True):
        assert len(set(of_source)) == len(of_source)
        assert all(start <= index < start + size for index in of_source)
        start += size
