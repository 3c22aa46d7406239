"""Tests that steps have equal samples and draws under every layout, in every process and after every resume."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from beit3_ds.batch import PackedBatch, StepBatch
from beit3_ds.config import ConfigError, RunConfig
from beit3_ds.data.loader import build_train_loader
from beit3_ds.tokenizers.text import TextTokenizer
from tests.data.conftest import BuildConfig, WriteTar
from tests.tasks.pretraining.samples import open_steps

Sequences = dict[str, list[tuple[str, tuple[torch.Tensor, ...]]]]


def _sequences(batch: PackedBatch) -> Sequences:
    """Divides a batch into sequences: by stream, the name of each sequence and all its tensors."""
    texts = list(batch.token_ids.split([*batch.caption_lengths, *batch.text_lengths]))
    masked = torch.zeros_like(batch.token_ids)
    masked[batch.targets["masked_tokens"]] = batch.targets["target_ids"]
    targets = list(masked.split([*batch.caption_lengths, *batch.text_lengths]))
    sequences: Sequences = {"images": [], "pairs": [], "texts": []}
    num_pixels = batch.num_images + batch.num_pairs
    assert batch.drop_path is not None
    for i, name in enumerate(batch.sample_names):
        tensors: list[torch.Tensor] = [batch.drop_path[i]]
        if i < num_pixels:
            tensors += [batch.pixels[i], batch.targets["tokenizer_pixels"][i], batch.patch_mask[i]]
        if i >= batch.num_images:
            tensors += [texts[i - batch.num_images], targets[i - batch.num_images]]
        stream = "images" if i < batch.num_images else "pairs" if i < num_pixels else "texts"
        sequences[stream].append((name, tuple(tensors)))
    return sequences


def _by_slot(step_of_rank: list[StepBatch]) -> Sequences:
    """Joins the ranks' shares of a step in the order of the slots."""
    joined: Sequences = {"images": [], "pairs": [], "texts": []}
    for micro_batches in zip(*(step.micro_batches for step in step_of_rank), strict=True):
        for batch in micro_batches:
            for stream, sequences in _sequences(batch).items():
                joined[stream] += sequences
    return joined


def _assert_same(ours: Sequences, theirs: Sequences) -> None:
    for stream in ours:
        assert [name for name, _ in ours[stream]] == [name for name, _ in theirs[stream]]
        for (_, our_tensors), (_, their_tensors) in zip(ours[stream], theirs[stream], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(our_tensors, their_tensors, strict=True))


@pytest.mark.parametrize(("size", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 1), (3, 1), (3, 2), (7, 2)])
def test_a_step_is_the_same_under_every_layout(
    build_config: BuildConfig, tokenizer: TextTokenizer, size: int, accumulation: int
) -> None:
    reference = open_steps(build_config(), tokenizer, 0, 1)
    config = build_config(accumulation=accumulation)
    ranks = [open_steps(config, tokenizer, rank, size) for rank in range(size)]
    for step in (0, 6):  # the second one crosses an epoch of every stream
        # catches slots dealt in another order, and masks, crops or drop path that depend on the rank
        _assert_same(_by_slot([rank[step] for rank in ranks]), _by_slot([reference[step]]))


def test_every_sample_comes_once_an_epoch(build_config: BuildConfig, tokenizer: TextTokenizer) -> None:
    dataset = open_steps(build_config(images=6), tokenizer, 0, 1)
    names = [name for step in range(11) for name, _ in _by_slot([dataset[step]])["images"]]
    counts = Counter(names)  # 66 positions over 22 images
    assert set(counts.values()) == {3}
    assert len(counts) == 22
    assert names[:22] != names[22:44]


def test_a_sample_looks_different_in_another_epoch(build_config: BuildConfig, tokenizer: TextTokenizer) -> None:
    dataset = open_steps(build_config(images=22), tokenizer, 0, 1)
    first, second = (dict(_by_slot([dataset[step]])["images"]) for step in (0, 1))
    for name, (_, pixels, _, mask) in first.items():
        # catches crops and masks drawn from the sample alone
        assert not torch.equal(pixels, second[name][1])
        assert not torch.equal(mask, second[name][3])


def test_a_step_can_be_asked_for_in_any_order(build_config: BuildConfig, tokenizer: TextTokenizer) -> None:
    dataset = open_steps(build_config(), tokenizer, 0, 1)
    forward = [_by_slot([dataset[step]]) for step in range(3)]
    for step in (2, 0, 1):
        _assert_same(_by_slot([dataset[step]]), forward[step])  # catches hidden state


def test_streams_without_samples_are_absent(build_config: BuildConfig, tokenizer: TextTokenizer) -> None:
    batch = open_steps(build_config(images=0, pairs=0), tokenizer, 0, 1)[0].micro_batches[0]
    assert (batch.num_images, batch.num_pairs, batch.num_texts) == (0, 0, 8)
    assert batch.pixels.shape == (0, 3, 32, 32)
    assert batch.targets["tokenizer_pixels"].shape == (0, 3, 64, 64)


def test_masks_have_the_configured_ratios(build_config: BuildConfig, tokenizer: TextTokenizer) -> None:
    batch = open_steps(build_config(), tokenizer, 0, 1)[0].micro_batches[0]
    assert batch.patch_mask.sum(dim=1).tolist() == [26] * 8  # 40% of 64, in every image
    captions = sum(min(round(n * 0.5), n - 1) for n in batch.caption_lengths)
    texts = sum(max(1, round(n * 0.15)) for n in batch.text_lengths)
    assert batch.term_counts == (4 * 26, texts, 4 * 26, captions)  # catches exchanged text ratios
    assert max(batch.caption_lengths) <= 12
    assert max(batch.text_lengths) <= 16


@pytest.fixture
def shard_with_broken_record(tmp_path: Path, write_tar: WriteTar, png: bytes) -> str:
    members = {f"{i}.png": png if i != 2 else png[:70] for i in range(4)}
    return write_tar(tmp_path / "broken.tar", members)


def test_a_broken_record_leaves_its_slot_empty(
    build_config: BuildConfig,
    tokenizer: TextTokenizer,
    tmp_path: Path,
    write_tar: WriteTar,
    png: bytes,
    shard_with_broken_record: str,
) -> None:
    whole = write_tar(tmp_path / "whole.tar", {f"{i}.png": png for i in range(4)})
    expected = open_steps(build_config(files={"images": whole}), tokenizer, 0, 1)[0]
    step = open_steps(build_config(files={"images": shard_with_broken_record}), tokenizer, 0, 1)[0]
    assert len(step.broken_records) == 1
    ((name, line),) = step.broken_records.items()
    assert name.endswith("broken.tar:2") and line.startswith(f"{name}: broken image")
    keys = [name.rpartition(":")[2] for name in expected.micro_batches[0].sample_names]
    expected_keys = [key for i, key in enumerate(keys) if i >= 4 or key != "2"]
    ours = step.micro_batches[0]
    assert [name.rpartition(":")[2] for name in ours.sample_names] == expected_keys
    # catches later slots that move up: the neighbours keep their masks and their drop path
    kept = torch.tensor([i for i, key in enumerate(keys) if i >= 4 or key != "2"])
    assert expected.micro_batches[0].drop_path is not None
    assert ours.drop_path is not None
    assert torch.equal(ours.drop_path, expected.micro_batches[0].drop_path[kept])
    assert torch.equal(ours.pixels, expected.micro_batches[0].pixels[kept[:7]])


def test_a_step_of_broken_records_still_packs(
    build_config: BuildConfig, tokenizer: TextTokenizer, tmp_path: Path, write_tar: WriteTar
) -> None:
    shard = write_tar(tmp_path / "all-broken.tar", {"a.png": b"", "b.png": b"", "a.txt": b"caption"})
    config = build_config(texts=0, files={"images": shard, "pairs": shard})
    step = open_steps(config, tokenizer, 0, 1)[0]
    # Two records, though eight slots are empty, and under the same names in both streams.
    assert [name.rpartition("/")[2] for name in sorted(step.broken_records)] == ["all-broken.tar:a", "all-broken.tar:b"]
    assert step.micro_batches[0].num_rows == 0
    assert step.micro_batches[0].term_counts == (0, 0, 0, 0)


def _mixed_config(build_config: BuildConfig, sample_files: dict[str, str], num_workers: int = 0) -> RunConfig:
    """Returns a run with twelve samples per step of each stream; pairs have two weighted sources.

    The steps cross the epochs of every source.
    """
    folder = Path(sample_files["pairs"]).parent
    sources = [
        {"path": str(folder / "pairs-0.tar"), "weight": 0.25},
        {"path": str(folder / "pairs-1.tar"), "weight": 1},
    ]
    pairs = {"train": sources, "samples_per_step": 12}
    return build_config(images=12, texts=12, data={"pairs": pairs, "num_workers": num_workers})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_global_steps_are_the_same_on_any_number_of_ranks(
    build_config: BuildConfig, sample_files: dict[str, str], tokenizer: TextTokenizer, num_workers: int
) -> None:
    reference = open_steps(_mixed_config(build_config, sample_files), tokenizer, 0, 1)
    expected = [_by_slot([reference[step]]) for step in range(12)]
    config = _mixed_config(build_config, sample_files, num_workers)
    for size in (1, 2, 3, 4) if num_workers == 0 else (3,):
        ranks = [open_steps(config, tokenizer, rank, size) for rank in range(size)]
        loaders = [build_train_loader(rank, config.data, first_step=0) for rank in ranks]
        for step, shares in enumerate(zip(*loaders, strict=True)):
            # catches another order as well as another set: 144 pairs are 14 epochs of one source and 23 of the other
            _assert_same(_by_slot(list(shares)), expected[step])


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_run_goes_on_with_other_ranks(
    build_config: BuildConfig, sample_files: dict[str, str], tokenizer: TextTokenizer, stop: int
) -> None:
    config = _mixed_config(build_config, sample_files)

    def names(size: int, first: int, last: int) -> list[str]:
        loaders = [
            build_train_loader(open_steps(config, tokenizer, rank, size), config.data, first) for rank in range(size)
        ]
        steps = itertools.islice(zip(*loaders, strict=True), last - first)
        return [name for shares in steps for stream in _by_slot(list(shares)).values() for name, _ in stream]

    # catches an order that counts from the restart, or in samples of a rank
    assert names(4, 0, stop) + names(3, stop, 12) == names(1, 0, 12)


def test_weighted_sources_share_the_stream(
    build_config: BuildConfig, sample_files: dict[str, str], tokenizer: TextTokenizer
) -> None:
    dataset = open_steps(_mixed_config(build_config, sample_files), tokenizer, 0, 1)
    names = [name for step in range(10) for name, _ in _by_slot([dataset[step]])["pairs"]]
    counts = Counter(names)
    assert sum(count for name, count in counts.items() if "pairs-0" in name) == 24  # 0.25 / 1.25 of 120
    # catches epochs of the stream instead of the source: 8 samples three times, 5 samples nineteen times and one more
    assert {counts[name] for name in counts if "pairs-0" in name} == {3}
    assert {counts[name] for name in counts if "pairs-1" in name} == {19, 20}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_resumes_at_any_step(build_config: BuildConfig, tokenizer: TextTokenizer, num_workers: int) -> None:
    config = build_config(data={"num_workers": num_workers})
    dataset = open_steps(config, tokenizer, 1, 2)
    steps = list(build_train_loader(dataset, config.data, first_step=8))
    assert [step.step for step in steps] == [8, 9, 10, 11]  # catches steps out of order, and a count from 0
    for step in steps:
        _assert_same(_by_slot([step]), _by_slot([dataset[step.step]]))  # catches draws seeded in the worker


def test_weighted_sources_may_not_share_a_file(
    build_config: BuildConfig, sample_files: dict[str, str], tokenizer: TextTokenizer
) -> None:
    one = str(Path(sample_files["pairs"]).parent / "pairs-0.tar")
    sources = [{"path": one, "weight": 1}, {"path": sample_files["pairs"], "weight": 1}]
    config = build_config(data={"pairs": {"train": sources, "samples_per_step": 4}})
    with pytest.raises(ConfigError, match=r"pairs-0\.tar is listed twice"):
        open_steps(config, tokenizer, 0, 1)


def test_a_worker_survives_a_broken_record(
    build_config: BuildConfig, tokenizer: TextTokenizer, shard_with_broken_record: str
) -> None:
    config = build_config(files={"images": shard_with_broken_record}, data={"num_workers": 1})
    steps = list(build_train_loader(open_steps(config, tokenizer, 0, 1), config.data, first_step=0))
    assert len(steps) == 12
    # four images, one broken, four a step: every step meets it; catches a worker that dies, or drops the report
    assert all(len(step.broken_records) == 1 and step.micro_batches[0].num_images == 3 for step in steps)


def test_a_finished_run_has_no_steps_left(build_config: BuildConfig, tokenizer: TextTokenizer) -> None:
    config = build_config()
    assert list(build_train_loader(open_steps(config, tokenizer, 0, 1), config.data, first_step=12)) == []
