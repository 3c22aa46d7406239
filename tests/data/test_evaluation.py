"""Tests batches of a whole split: each sample once, in equal batches on any number of ranks."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ConfigError, RunConfig
from beit3_ds.data import EvaluationBatches
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.records import BrokenRecordError, Skipped
from beit3_ds.data.packing import pack_inputs
from beit3_ds.data.samples import SampleKey, Stream
from beit3_ds.data.sources import ConcatSources
from tests.run_config import small_run_config


@dataclass(frozen=True)
class Numbers:
    is_last_open: ClassVar[bool] = False
    count: int
    broken: int = -1

    def __len__(self) -> int:
        return self.count

    def files(self) -> Iterable[SourceFile]:
        return [SourceFile("numbers", None, self.count)]

    def identity(self, index: int) -> bytes:
        return self.name(index).encode()

    def name(self, index: int) -> str:
        return f"numbers:{index}"

    def skipped(self) -> dict[str, Skipped]:
        return {}

    def prepare(self, index: int, key: SampleKey) -> tuple[str, int]:
        if index == self.broken:
            raise BrokenRecordError(f"{self.name(index)}: broken image")
        return key.stream, key.index


def pack(samples: Sequence[Any], drop_path: Tensor | None, sources: Mapping[str, int]) -> PackedBatch:
    batch = pack_inputs(num_images=0, pixels=torch.empty(0, 3, 1, 1), num_patches=1, drop_path=drop_path)
    numbers = {name: [index for stream, index in samples if stream == name] for name in ("images", "texts")}
    return dataclasses.replace(batch, targets={name: torch.tensor(found) for name, found in numbers.items()})


def config_of(**training: Any) -> RunConfig:
    config = small_run_config(0)
    data = dataclasses.replace(config.data, num_workers=0)
    return dataclasses.replace(config, data=data, training=dataclasses.replace(config.training, **training))


def open_batches(rank: int, size: int, broken: int = -1, **training: Any) -> EvaluationBatches:
    streams = {
        "images": Stream(ConcatSources([Numbers(7), Numbers(6, broken)])),
        "texts": Stream(ConcatSources([Numbers(5)])),
    }
    return EvaluationBatches(config_of(eval_batch_size=3, **training), streams, pack, rank, size)


def contents(batches: EvaluationBatches) -> list[tuple[list[int], list[int]]]:
    return [(batch.targets["images"].tolist(), batch.targets["texts"].tolist()) for batch in batches]


def test_any_number_of_ranks_sees_the_same_batches() -> None:
    one = contents(open_batches(0, 1, eval_samples=None))
    assert [number for images, _ in one for number in images] == list(range(13))
    assert [number for _, texts in one for number in texts] == list(range(5))
    for size in (2, 3, 4):
        ranks = [contents(open_batches(rank, size, eval_samples=None)) for rank in range(size)]
        assert len({len(batches) for batches in ranks}) == 1  # catches ranks that wait for a missing batch
        together = [batches[number] for number in range(len(ranks[0])) for batches in ranks]
        assert together[: len(one)] == one  # catches a cut that depends on the ranks
        assert not any(images or texts for images, texts in together[len(one) :])


def test_a_limit_keeps_some_samples_of_each_source() -> None:
    batches = open_batches(0, 1, eval_samples=4)
    chosen = [number for images, _ in contents(batches) for number in images]
    assert len(set(chosen)) == 4 and min(chosen) < 7 <= max(chosen)
    assert batches.num_samples == {"images": 4, "texts": 4}


def test_a_broken_record_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"numbers:5: broken image.*part of an evaluation"):
        list(open_batches(0, 1, broken=5, eval_samples=None))
