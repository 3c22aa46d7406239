"""Tests validation losses and entropies, visual targets, and the learning rate of each update."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch, StepBatch
from beit3_ds.model import LossOutput
from beit3_ds.parallel import Mesh
from beit3_ds.pipeline.schedule import Schedule
from beit3_ds.tasks import Term
from beit3_ds.tasks.pretraining.baselines import TERM_STREAMS, unigram_entropies
from beit3_ds.tasks.pretraining.model import PretrainingModel
from beit3_ds.tasks.pretraining.targets import prepare_batch
from beit3_ds.training import loop
from beit3_ds.training.evaluation import evaluate
from beit3_ds.training.progress import format_evaluation
from tests.batches import random_batch, small_model_config

CONFIG = small_model_config()
CPU = torch.device("cpu")
TERMS = [Term(name, stream, name) for name, stream in TERM_STREAMS.items()]


class NumberedCodes:
    """Fakes a visual tokenizer whose codes are computed from patch position and the first pixel of the image."""

    def encode(self, pixels: Tensor, colors: Tensor | None = None) -> Tensor:
        return (pixels[:, 0, 0, 0].long()[:, None] + torch.arange(CONFIG.num_patches)) % CONFIG.visual_vocab_size


class CountingEngine:
    """Fakes an engine whose four terms have a loss of 1, 2, 3 and 4 at every position."""

    def __init__(self) -> None:
        self.training = True
        self.modes: list[bool] = []
        self.device = CPU
        self.module = PretrainingModel(CONFIG)

    def eval(self) -> None:
        self.training = False

    def train(self) -> None:
        self.training = True

    def __call__(self, batch: PackedBatch, factors: Tensor, x_TD: None, layers: range) -> LossOutput:
        assert layers == range(CONFIG.num_pipeline_layers)
        self.modes.append(self.training)
        assert batch.targets["visual_codes"] is not None
        return LossOutput(torch.zeros(()), torch.tensor(batch.term_counts) * torch.tensor([1.0, 2.0, 3.0, 4.0]))


def prepare(batch: PackedBatch) -> PackedBatch:
    return prepare_batch(batch, NumberedCodes().encode, CPU)


def batches() -> list[PackedBatch]:
    return [random_batch(CONFIG, *mix, seed=seed) for seed, mix in enumerate([(2, 1, 3), (1, 2, 0), (0, 0, 2)])]


def test_means_are_over_all_positions_of_all_batches() -> None:
    engine: Any = CountingEngine()
    schedule = Schedule(engine, [range(CONFIG.num_pipeline_layers)], Mesh())
    means = evaluate(schedule, batches(), prepare, TERMS, Mesh(), CPU, {})
    assert means == pytest.approx({"image_mim": 1, "text_mlm": 2, "pair_mim": 3, "pair_mlm": 4})
    assert engine.modes == [False] * 3  # catches stochastic depth in the validation loss
    assert engine.training  # catches training that continues without stochastic depth


class PerBatchEngine(CountingEngine):
    """Fakes an engine that returns the loss n at every position of the n-th batch."""

    def __call__(self, batch: PackedBatch, factors: Tensor, x_TD: None, layers: range) -> LossOutput:
        self.modes.append(self.training)
        return LossOutput(torch.zeros(()), torch.tensor(batch.term_counts) * float(len(self.modes)))


def test_losses_and_entropies_of_each_source() -> None:
    engine: Any = PerBatchEngine()
    encode = NumberedCodes().encode
    schedule = Schedule(engine, [range(CONFIG.num_pipeline_layers)], Mesh())
    own = [dataclasses.replace(batch, sources={"texts": number % 2}) for number, batch in enumerate(batches() * 2)]
    names = {"images": ["photos"], "pairs": ["coco"], "texts": ["books", "wiki", "absent"]}
    means = evaluate(schedule, own, prepare, TERMS, Mesh(), CPU, names)
    counts = [batch.term_counts[1] for batch in own]
    for source, name in enumerate(("books", "wiki")):
        numbers = range(source, len(own), 2)
        expected = sum(counts[n] * (n + 1) for n in numbers) / sum(counts[n] for n in numbers)
        assert means[f"text_mlm/{name}"] == pytest.approx(expected)  # catches a sum added to another source
    assert means["text_mlm"] == pytest.approx(sum(c * (n + 1) for n, c in enumerate(counts)) / sum(counts))
    assert set(means) == {"image_mim", "pair_mim", "pair_mlm", "text_mlm", "text_mlm/books", "text_mlm/wiki"}

    entropies = unigram_entropies(own, encode, CONFIG, Mesh(), CPU, names)
    assert set(entropies) == set(means)
    books: Any = [batch for batch in own if batch.sources["texts"] == 0]
    alone = unigram_entropies(books, encode, CONFIG, Mesh(), CPU, {})
    assert entropies["text_mlm/books"] == pytest.approx(alone["text_mlm"])

    line = format_evaluation({"step": 3, "kind": "validation", **means}, TERMS)
    assert f"text_mlm {means['text_mlm']:.3f} (books {means['text_mlm/books']:.3f}, wiki" in line


def test_targets_are_the_codes_of_the_masked_patches() -> None:
    batch, tokenizer = batches()[0], NumberedCodes()
    numbers = torch.arange(3.0).view(3, 1, 1, 1)  # no two images alike
    views = numbers.expand_as(batch.targets["tokenizer_pixels"])
    batch = dataclasses.replace(batch, targets={**batch.targets, "tokenizer_pixels": views})
    targets = prepare_batch(batch, tokenizer.encode, CPU).targets["visual_codes"]
    codes = tokenizer.encode(batch.targets["tokenizer_pixels"])
    expected = [int(codes[image, patch]) for image, patch in batch.patch_mask.nonzero().tolist()]
    assert targets.tolist() == expected  # catches the codes of another image


def test_unigram_entropy_counts_what_may_be_asked_for() -> None:
    batch = batches()[0]
    encode = NumberedCodes().encode
    entropies = unigram_entropies([batch], encode, CONFIG, Mesh(), CPU, {})
    original = batch.token_ids.clone()
    original[batch.targets["masked_tokens"]] = batch.targets["target_ids"]  # catches the frequencies of mask tokens
    texts = original.split([*batch.caption_lengths, *batch.text_lengths])
    asked = torch.cat([text[1:] for text in texts[batch.num_pairs :]])  # BOS is never predicted
    shares = torch.bincount(asked).double()
    shares = shares[shares > 0] / len(asked)
    assert entropies["text_mlm"] == pytest.approx(-float((shares * shares.log()).sum()))
    assert entropies["image_mim"] <= math.log(CONFIG.visual_vocab_size)


def test_an_update_gets_its_own_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rate that stays at the peak; DeepSpeed gets no schedule, so the trainer must set each rate."""
    used: list[float] = []
    group = {"lr": 1.0, "lr_scale": 1.0}
    monkeypatch.setattr(loop, "apply_update", lambda engine, mesh: used.append(group["lr"]) or 1.0)
    run: Any = SimpleNamespace(
        engine=SimpleNamespace(optimizer=SimpleNamespace(param_groups=[group])),
        schedule=SimpleNamespace(accumulate_gradients=lambda batches, factors, prepare: torch.zeros(4)),
        prepare=None,
        terms=TERMS,
        mesh=Mesh(),
        device=CPU,
    )
    loop._update(run, StepBatch(step=0, micro_batches=()), torch.ones(4, dtype=torch.int64), 0.25, lambda: None)
    assert used == [0.25]
