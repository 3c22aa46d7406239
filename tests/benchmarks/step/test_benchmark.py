"""Tests the benchmark of the training step: the speed of its reference, its upper bound and its ratios."""

import importlib.metadata
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_ds.benchmarks.step import benchmark as bench
from beit3_ds.benchmarks.step import reference as train_reference
from beit3_ds.benchmarks.step.batches import build_batch, step_config
from beit3_ds.benchmarks.step.products import Products, needed_flops
from beit3_ds.benchmarks.step.reference import ReferenceTrainer, unpack_streams
from beit3_ds.cli import main as cli
from beit3_ds.config import RunConfig
from beit3_ds.model.attention import MultiwayAttention
from beit3_ds.model.flops import layer_flops, work_of
from beit3_ds.model.multiway import RowParallelMultiwayLinear, UpProjection
from beit3_ds.tasks import Term
from beit3_ds.tasks.pretraining.baselines import TERM_STREAMS
from beit3_ds.tasks.pretraining.heads import head_flops
from beit3_ds.training.loss import build_loss_factors
from beit3_ds.weights.export import export_weights
from tests.benchmarks.code_hash import code_hash
from tests.weights.models import ModelReader, random_model

REFERENCE_HASH = "2ebec96142a64ca9c220634327afa38c2085e627d1f34d64917c5f4daafda4f4"


@pytest.fixture
def config() -> RunConfig:
    """Returns the configuration of a narrow model with all features and a small vocabulary."""
    run = step_config("tiny", 2, num_layers=3, drop_path_rate=0.0)
    return replace(run, backbone=replace(run.model, text_vocab_size=301, visual_vocab_size=67))


def test_the_reference_is_not_slowed() -> None:
    """Catches changes of the reference's code, after which old and new ratios in BENCHMARKS.md are not comparable.

    After such a change, measure before and after it, report it in BENCHMARKS.md, and update the hash here. The hash
    ignores docstrings and comments.
    """
    assert code_hash(train_reference) == REFERENCE_HASH


@pytest.mark.parametrize("lengths", [(64, 128), (None, None)])
def test_both_sides_compute_the_same_loss_and_gradients(
    config: RunConfig, tmp_path: Path, lengths: tuple[int | None, int | None]
) -> None:
    batch = build_batch(config, 0)
    ours = random_model(config.model)
    trainer = ReferenceTrainer(config, torch.device("cpu"))
    export_weights(ModelReader(ours), tmp_path / "weights.pth", format="unilm-dual")
    trainer.model.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True)["model"], strict=True)

    streams = unpack_streams(batch, *lengths)
    padded = [stream.tokens.shape[1] for stream in streams if stream.tokens is not None]
    assert padded == [lengths[0] or max(batch.caption_lengths), lengths[1] or max(batch.text_lengths)]
    patches, tokens = zip(*(stream.num_masked for stream in streams), strict=True)
    image_mim, text_mlm, pair_mim, pair_mlm = batch.term_counts
    assert patches == (image_mim, pair_mim, 0) and tokens == (0, pair_mlm, text_mlm)
    terms = [Term(name, stream, name) for name, stream in TERM_STREAMS.items()]
    factors = build_loss_factors(torch.tensor(batch.term_counts), terms, 1)
    loss = ours(batch, factors).total
    loss.backward()
    theirs = torch.stack([term for stream in streams for term in trainer.model(stream)]).sum()
    theirs.backward()
    assert theirs.item() == pytest.approx(loss.item(), rel=1e-4)
    norms = [
        float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])) for model in (ours, trainer.model)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)  # catches a stream that is left out or counted twice


def test_the_reference_trains(config: RunConfig) -> None:
    trainer, streams = ReferenceTrainer(config, torch.device("cpu")), unpack_streams(build_batch(config, 0), 64, 128)
    losses = [trainer.step(streams) for _ in range(4)]
    assert losses[-1] < losses[0]  # catches gradients that are cleared before the update
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("layout", ["decoupled", "shared"])
def test_the_ceiling_multiplies_what_the_model_must(config: RunConfig, layout: str) -> None:
    changes: dict[str, Any] = {"layout": layout, "num_vision_language_layers": 1} if layout == "shared" else {}
    model, batch = replace(config.model, **changes), build_batch(config, 1)
    products = Products(model, batch, torch.float32, torch.device("cpu"))
    embeddings, *rest = layer_flops(model, work_of(batch, head_flops(model, batch.term_counts)))
    # Forward, and twice as much backward; pixels have no gradient.
    assert products.flops == 2 * embeddings + 3 * sum(rest)
    products.run()
    layers = [product for layer in products.layers for product in (*layer.forward, *layer.backward)]
    for product in layers:  # catches one that is listed but not run
        torch.testing.assert_close(product.out, product.a @ product.b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("drops", [False, True])
def test_needed_products_are_those_that_a_step_multiplies(config: RunConfig, drops: bool) -> None:
    """Compares the predicted multiplications with the rows that reach attention and FFN in every layer.

    With stochastic depth, a block may skip rows.
    """
    batch = build_batch(config, 1)
    if drops:
        drop_path = torch.full((batch.num_sequences, config.model.num_layers, 2), 1.25)
        drop_path[[0, 3, 5], [0, 1, 1], [0, 0, 1]] = 0  # an image, a pair and a text; the last FFN takes all
        batch = replace(batch, drop_path=drop_path)
    model, seen = random_model(config.model), []
    for module in model.modules():
        if isinstance(module, MultiwayAttention | UpProjection | RowParallelMultiwayLinear):
            module.register_forward_pre_hook(
                lambda module, args: seen.append(getattr(args[0], "x_TF", args[0]).shape[0] * module.weight_numel)
            )
            is_attention = isinstance(module, MultiwayAttention)
            layers = [module.q_proj, module.k_proj, module.v_proj] if is_attention else [module]
            module.weight_numel = sum(getattr(layer, f"weight_{layer.experts[0]}").numel() for layer in layers)
    model(batch, torch.ones(4))
    embeddings, *_, heads = layer_flops(config.model, work_of(batch, head_flops(config.model, batch.term_counts)))
    attended = 0.0
    for layer in range(config.model.num_layers):
        lengths = [sum(stop - start for start, stop in ranges) for ranges in batch.sequence_ranges]
        if drops:
            lengths = [n for n, f in zip(lengths, batch.drop_path[:, layer, 0].tolist(), strict=True) if f]
        attended += 4 * config.model.hidden_size * sum(n * n for n in lengths)
    expected = 2 * embeddings + 3 * (2 * sum(seen) + attended + heads)
    assert needed_flops(config.model, batch) == pytest.approx(expected, rel=1e-12)
    assert expected < Products(config.model, batch, torch.float32, torch.device("cpu")).flops


def test_ratios_are_the_right_way_up() -> None:
    row = {
        "products": {"seconds": 9.0, "flops": 30, "needed_flops": 20},
        "beit3_ds": {"seconds": 10.0, "cpu_seconds": 20.0, "peak_bytes": 6},
        "torchscale": {"seconds": 15.0, "cpu_seconds": 25.0, "peak_bytes": 8},
    }
    summary = bench._summarize([row])
    ratios = {"ratio": 1.5, "cpu_ratio": 1.25, "gemm_share": 0.9, "reference_gemm_share": 0.6, "memory_ratio": 0.75}
    ratios["needed_gemm_share"] = 0.6
    assert {name: summary[name] for name in ratios} == pytest.approx(ratios)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "train.json"
    arguments = ["bench", "train", "--size", "tiny", "--samples", "1", "--rounds", "2", "--json", str(out)]
    assert cli.main(arguments) == 0
    result = json.loads(out.read_text())
    summary = result["summary"]
    assert {"ratio", "gemm_share", "memory_ratio"} <= set(summary) and summary["samples"] == 3
    assert 0 < summary["gemm_share"] < 1
    for row in result["rows"]:
        assert set(row) == {"products", "beit3_ds", "torchscale"}
        assert row["beit3_ds"]["masked"] == row["torchscale"]["masked"]
        for side in ("beit3_ds", "torchscale"):
            # Uniform guesses among 64010 words and 8192 codes, twice each: the steps of both are those of a beginning.
            assert row[side]["loss"] == pytest.approx(2 * math.log(64010 * 8192), abs=1.5)
            assert row[side]["peak_bytes"] > 36e6 * 16  # weights, gradients and moments; catches kB taken for bytes
    assert result["rows"][0]["products"]["batch"] != result["rows"][1]["products"]["batch"]
    printed = capsys.readouterr()
    assert "| torchscale |" in printed.out and "round 2 of 2" in printed.err


@pytest.mark.parametrize("version", [None, "0.2.0"])
def test_another_torchscale_is_an_error(
    version: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find(package: str) -> str:
        if package != "torchscale" or version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    assert cli.main(["bench", "train"]) == 2
    error = capsys.readouterr().err
    assert f"torchscale is {version or 'absent'}" in error
    assert "pip install --no-deps torchscale==0.3.0" in error


def test_wrong_arguments_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "train", "--size", "huge"]) == 2
    assert "'huge' is not one of" in capsys.readouterr().err
    assert cli.main(["bench", "train", "--rounds", "0"]) == 2
    assert cli.main(["bench", "train", "--json", str(tmp_path / "absent" / "train.json")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
