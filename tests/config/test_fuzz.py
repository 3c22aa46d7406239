"""Tests random mistakes in configuration files.

A mistake must give one line and status 2. A run that `beit3 check` accepts must start.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.config import ConfigError, RunConfig, check_layout, load_run_config
from beit3_ds.tasks import build_task
from beit3_ds.training.dry_run import describe_dry_run
from tests.config.mutations import duplicate_key, mutate, to_text
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
WORLD_SIZES = {"quickstart_cpu": 1, "base_8gpu": 8, "giant_zero3_64gpu": 64, "beit3_4b_tp2_pp2_zero1": 32}


def outcome(path: Path, world_size: int) -> RunConfig | None:
    """Returns the configuration, or None if it was refused; fails if the error is not a single clear line."""
    try:
        config = load_run_config(path)
        check_layout(config, world_size)
        build_task(config)
    except ConfigError as error:
        message = str(error)
    else:
        return config
    assert message and len(message) < 2000 and "\n" not in message, message
    return None


def fuzz_files(folder: Path, seed: int, count: int) -> int:
    """Loads randomly changed copies of the shipped files; returns the number of accepted ones."""
    rng, num_accepted = random.Random(seed), 0
    originals = [(path.stem, json.loads(path.read_text())) for path in SHIPPED]
    for number in range(count):
        name, original = rng.choice(originals)
        mutant, said = mutate(original, rng)
        text = to_text(mutant)
        path = folder / "mutant.json"
        path.write_text(text)
        try:
            num_accepted += outcome(path, WORLD_SIZES.get(name, 128)) is not None
            if number % 10 == 0:
                path.write_text(duplicate_key(to_text(original), rng))
                with pytest.raises(ConfigError, match="appears twice in one object"):
                    load_run_config(path)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {name}, mutant {number}: {said}") from error
    return num_accepted


def test_mistakes_in_files_are_one_line(tmp_path: Path) -> None:
    """Catches a value that nothing checks and that raises an error later."""
    num_accepted = fuzz_files(tmp_path, seed=0, count=600)
    assert 60 < num_accepted < 540  # else the mutants say nothing of one side


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_thousands_of_mistakes_in_files_are_one_line(tmp_path: Path, seed: int) -> None:
    fuzz_files(tmp_path, seed, 2000)


def fuzz_runs(mapping: dict[str, Any], folder: Path, seed: int, count: int) -> dict[str, int]:
    """Trains every randomly changed run that `beit3 check` accepts for two steps; returns the count of each outcome."""
    rng = random.Random(seed)
    ends = {"refused": 0, "too large to run here": 0, "trained": 0}
    paths, descriptions = [], []
    while len(paths) < count:
        base = json.loads(json.dumps(mapping))
        stage = rng.randrange(4)
        base["zero_optimization"] = {"stage": stage}
        if rng.random() < 0.3:
            base["bf16"] = {"enabled": True}
        mutant, said = mutate(base, rng)
        path = folder / f"mutant-{len(paths)}.json"
        path.write_text(to_text(mutant))
        config = outcome(path, 1)
        if config is None:
            ends["refused"] += 1
        elif not _is_small(config):
            ends["too large to run here"] += 1
        else:
            try:
                describe_dry_run(config, 1)
            except ConfigError:
                ends["refused"] += 1
                continue
            own = mutant["beit3_ds"]
            own["training"] |= {"total_steps": 2, "warmup_steps": min(2, own["training"]["warmup_steps"])}
            own["training"] |= {"eval_samples": 1, "output_dir": str(folder / f"run-{len(paths)}")}
            path.write_text(to_text(mutant))
            paths.append(str(path))
            descriptions.append(f"ZeRO-{stage}: {said}")
    (results,) = run_ranks(_train_all, 1, paths, timeout=3000)
    wrong = [
        (said, *result) for said, result in zip(descriptions, results, strict=True) if not _is_agreed(said, *result)
    ]
    assert not wrong, "\n".join(map(str, wrong))
    ends["trained"] = sum(status == 0 for status, _ in results)
    return ends


def _is_small(config: RunConfig) -> bool:
    model, visual = config.model, config.tokenizers.visual
    widths = (model.hidden_size, model.ffn_hidden_size, visual.hidden_size)
    zero = config.deepspeed.get("zero_optimization", {})
    return (
        max(widths) <= 512
        and max(model.num_layers, visual.num_layers) <= 12
        and model.image_size <= 256
        and model.num_patches <= 1024
        and max(model.text_vocab_size, model.visual_vocab_size, model.max_text_length) <= 100_000
        and config.samples_per_step <= 64
        and config.gradient_accumulation_steps <= 8
        and config.data.num_workers == 0  # a rank of the tests may not start processes of its own
        and zero.get("reduce_bucket_size", 0) <= 500_000_000
    )


def _is_agreed(said: str, status: int, error: str) -> bool:
    """Returns whether an accepted run succeeded, or was refused for a reason that only its data files show."""
    if status == 0:
        return True
    return status == 2 and error.count("\n") <= 1 and bool(re.search(r"tokenizer|\.tar|\.spm|no file matches", error))


def _train_all(paths: list[str]) -> list[tuple[int, str]]:
    """Trains each configuration file on one rank; returns exit statuses and error outputs."""
    import contextlib
    import io
    import os
    import traceback

    from beit3_ds import train

    train.write_report = lambda *arguments: None  # half of the time, and no setting's business
    results = []
    os.chdir(ROOT)
    for path in paths:
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                status = train.main([path])
            results.append((status, errors.getvalue().strip()))
        except BaseException:
            results.append((1, traceback.format_exc()[-1500:]))
    return results


@pytest.fixture
def tiny_mapping(run_mapping: dict[str, Any]) -> dict[str, Any]:
    """Returns a run of two steps with two samples each, with settings that users often change."""
    own = run_mapping["beit3_ds"]
    own["training"] |= {
        "min_learning_rate": 1e-5,
        "weight_decay": 0.05,
        "adam_betas": [0.9, 0.98],
        "adam_epsilon": 1e-6,
        "activation_checkpointing": "none",
        "seed": 1,
    }
    own["data"] |= {"flip_probability": 0.5, "prefetch_steps": 1}
    own["task"] = {"name": "pretraining", "image_mask_ratio": 0.4, "text_mask_ratio": 0.15}
    own["task"] |= {"loss_weights": {"image_mim": 1.0, "text_mlm": 1.0}}
    return run_mapping


def test_what_check_accepts_trains(tiny_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Catches a key that `beit3 check` accepts and that DeepSpeed, the model or the data pipeline refuses."""
    ends = fuzz_runs(tiny_mapping, tmp_path, seed=0, count=10)
    assert ends["trained"] >= 5, ends


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_hundreds_of_runs_that_check_accepts_train(tiny_mapping: dict[str, Any], tmp_path: Path, seed: int) -> None:
    print(fuzz_runs(tiny_mapping, tmp_path, seed, 40))
