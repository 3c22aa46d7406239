"""Tests that the error for a bad configuration names the key, the rule and a remedy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.config import ConfigError, SourceConfig, build_run_config, load_run_config
from beit3_ds.tasks import build_task
from tests.run_config import quickstart_mapping


def own(mapping: dict[str, Any], section: str) -> dict[str, Any]:
    return mapping["beit3_ds"][section]


def m_terms() -> tuple[str, ...]:
    return ("image_mim", "text_mlm", "pair_mim", "pair_mlm")


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "top level": (lambda m: m.update(zero_optimisation={}), r"unknown key 'zero_optimisation'.*'zero_optimization'"),
    "section": (lambda m: m["beit3_ds"].update(trainning={}), r"unknown key 'trainning'.*'training'"),
    "model": (lambda m: own(m, "model").update(hidden_sise=1), r"beit3_ds\.model.*'hidden_sise'.*'hidden_size'"),
    "with a size": (lambda m: own(m, "model").update(size="base", num_heds=1), r"unknown key 'num_heds'"),
    "stream": (lambda m: own(m, "data")["pairs"].update(validatoin=[]), r"data\.pairs.*'validatoin'.*'validation'"),
    "old name": (
        lambda m: own(m, "data")["pairs"].update(heldout=[]),
        r"data\.pairs.*'heldout' is called 'validation'",
    ),
    "old folder": (lambda m: own(m, "data").update(prepared_dir="x"), r"'prepared_dir' is called 'cache_dir' now"),
    "old section": (
        lambda m: own(m, "data").update(text_masking="token"),
        r"text_masking.*Move it to task\.text_masking",
    ),
    "old weights": (
        lambda m: own(m, "training").update(initial_weights="x"),
        r"'initial_weights' is called 'init_from'",
    ),
    "source": (lambda m: own(m, "data")["pairs"].update(train=[{"pth": "a"}]), r"train\[0\].*'pth'.*'path'"),
    "no pattern": (lambda m: own(m, "data")["pairs"].update(train=[3]), r"train\[0\]: expected a JSON object, got int"),
    "some weights": (
        lambda m: own(m, "data")["pairs"].update(train=["a.tar", {"path": "b.tar", "weight": 0.3}]),
        r"'a\.tar' has no weight.*every source of the stream, or to none",
    ),
    "weight of 0": (
        lambda m: own(m, "data")["pairs"].update(train=[{"path": "b.tar", "weight": 0}]),
        r"data\.pairs\.train\[0\]\.weight is 0; it must be between 1e-06 and",
    ),
    "validation weight": (
        lambda m: own(m, "data")["pairs"].update(validation=[{"path": "b.tar", "weight": 1}]),
        r"validation source 'b\.tar'.*Remove it",
    ),
    "images as texts": (
        lambda m: own(m, "data")["texts"].update(train=[{"path": "b.tar", "format": "tar"}]),
        r"data\.texts: source 'b\.tar' has the format tar, which is for images",
    ),
    "tokenizer": (lambda m: own(m, "tokenizers")["visual"].update(codebook=1), r"'codebook'.*'codebook_"),
    "weights": (lambda m: own(m, "task").update(loss_weights={"mim": 1}), r"unknown key 'mim'"),
    "missing key": (lambda m: own(m, "training").pop("total_steps"), r"'total_steps' is missing"),
    "missing section": (lambda m: m["beit3_ds"].pop("data"), r"section 'data' is missing"),
    "NaN": (lambda m: own(m, "training").update(learning_rate=float("nan")), r"training\.learning_rate is nan"),
    "unfinite": (lambda m: own(m, "data").update(color_jitter=float("inf")), r"data\.color_jitter is inf"),
    "negative loss weight": (
        lambda m: own(m, "task").update(loss_weights={"pair_mim": -1}),
        r"loss_weights\.pair_mim is -1; it must be between 0",
    ),
    "nothing to learn": (
        lambda m: own(m, "task").update(loss_weights=dict.fromkeys(m_terms(), 0)),
        r"every term that has samples has weight 0",
    ),
    "end above the peak": (
        lambda m: own(m, "training").update(min_learning_rate=0.1),
        r"min_learning_rate=0.1 exceeds learning_rate=0.003",
    ),
    "a section of ours at the top": (lambda m: m.update(training={}), r"'training' .* move it into 'beit3_ds'"),
    "size that is a list": (lambda m: own(m, "model").update(size=[]), r"model\.size: list \[\] is not one of"),
    "float for int": (lambda m: own(m, "training").update(total_steps=1e3), r"expected int, got float .* Write 1000"),
    "number for a path": (lambda m: own(m, "training").update(output_dir=7), r"expected str, .* Write it in quotes"),
    "a NUL in a path": (lambda m: own(m, "training").update(output_dir="a\0b"), r"output_dir: str 'a.x00b' holds"),
    "half a character": (lambda m: own(m, "training").update(output_dir="\ud800"), r"output_dir: str .* holds"),
    "wrong type": (lambda m: own(m, "training").update(total_steps="many"), r"training\.total_steps: expected int"),
    "bool for int": (lambda m: own(m, "training").update(total_steps=True), r"expected int, got bool"),
    "unknown size": (lambda m: own(m, "model").update(size="huge"), r"'huge' is not one of 'tiny', 'base'"),
    "unknown layout": (lambda m: own(m, "model").update(layout="split"), r"'split' is not one of 'shared'"),
    "heads": (lambda m: own(m, "model").update(num_attention_heads=5), r"5 does not divide hidden_size=128.*4 or 8"),
    "patches": (lambda m: own(m, "model").update(patch_size=9), r"9 does not divide image_size=64.*8 or 16"),
    "grid": (lambda m: own(m, "model").update(patch_size=16), r"grid of 8.*grid of 4.*image_size to 32"),
    "codes": (lambda m: own(m, "model").update(visual_vocab_size=99), r"visual_vocab_size=99 must equal"),
    "vocabulary": (lambda m: own(m, "model").update(text_vocab_size=1001), r"too small.*at least 1002"),
    "text length": (lambda m: own(m, "data").update(text_length=65), r"max_text_length=64.*Raise it to 65"),
    "warmup": (
        lambda m: own(m, "training").update(warmup_steps=10**6),
        r"warmup_steps=1000000 exceeds total_steps=320, .* add --set training\.warmup_steps=32",
    ),
    "ratio": (lambda m: own(m, "task").update(image_mask_ratio=40), r"image_mask_ratio is 40; it must be between"),
    "decoupled with VL experts": (
        lambda m: own(m, "model").update(layout="decoupled"),
        r"num_vision_language_layers to 0",
    ),
    "their optimizer": (
        lambda m: m.update(optimizer={"type": "AdamW"}),
        r"optimizer is not supported: use beit3_ds\.training",
    ),
    "accumulation": (
        lambda m: m.update(gradient_accumulation_steps=0),
        r"gradient_accumulation_steps: expected an integer between 1 and",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_config(case: str) -> None:
    change, message = BAD[case]
    mapping = quickstart_mapping()
    change(mapping)
    with pytest.raises(ConfigError, match=message):
        build_task(build_run_config(mapping))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_run_config(tmp_path / "absent.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"a": 1,}')
    with pytest.raises(ConfigError, match=r"broken\.json: not valid JSON.*line 1"):
        load_run_config(broken)
    for text, message in (
        (json.dumps(quickstart_mapping() | {"gradient_clipping": float("nan")}), "gradient_clipping: .* got float nan"),
        (json.dumps(quickstart_mapping() | {"steps_per_print": -float("inf")}), "steps_per_print: .* got float -inf"),
        ('{"a": ' + "1" * 5000 + "}", "an integer has more digits"),
        ("[" * 100_000, "nested too deep"),
        ("\ufeff{}", "not valid JSON"),
        ("3", "expected a JSON object at the top, got int 3"),
    ):
        broken.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            load_run_config(broken)
    broken.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run_config(broken)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run_config(tmp_path)
    for text in ("[]", "null", "3"):
        broken.write_text(text)
        for change in ("train_batch_size=1", "training.total_steps=1"):
            with pytest.raises(ConfigError, match="expected a JSON object at the top"):  # catches a raw TypeError
                load_run_config(broken, [change])
    for name, message in (
        ("~no_such_user/run.json", "unknown user"),
        ("a\0b.json", "cannot be read"),
        ("", "is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_run_config(name)
    for text in ('{"a\\nb": 1}', '{"a\\nb": 1, "a\\nb": 2}', '{"beit3_ds": {"a\\nb": 1}}', '{"bf16": {"a\\nb": 1}}'):
        broken.write_text(text)
        with pytest.raises(ConfigError, match=r"^[^\n]*'a\\nb'[^\n]*$"):  # catches a message of two lines
            load_run_config(broken)
    broken.write_text('{"a": 1, "a": 2}')
    with pytest.raises(ConfigError, match="the key 'a' appears twice"):
        load_run_config(broken)


def test_a_string_stands_for_a_source() -> None:
    mapping = quickstart_mapping()
    own(mapping, "data")["pairs"]["train"] = ["a-*.tar", {"path": "b.tar"}]
    assert build_run_config(mapping).data.pairs.train == (SourceConfig(path="a-*.tar"), SourceConfig(path="b.tar"))


def test_changes_reach_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(quickstart_mapping()))
    changes = ["training.total_steps=7", "zero_optimization.stage=1", "parallel={}", "training.output_dir=runs/other"]
    config = load_run_config(path, [*changes, "training.warmup_steps=1"])
    assert (config.training.total_steps, config.training.output_dir) == (7, "runs/other")
    assert config.deepspeed["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainin.total_steps=7", "unknown key 'trainin'. Did you mean 'training'"),  # not a list of 60 keys
        ("modl.hidden_size=7", "Did you mean 'model'"),
        ("zero_optimisation.stage=1", "Did you mean 'zero_optimization'"),
        ("beit3ds.training.total_steps=7", "Did you mean 'beit3_ds'"),
        ("data.image.samples_per_step=7", "unknown key 'image'. Did you mean 'images'"),
        ("tokenizers.visul.path=a", "unknown key 'visul'. Did you mean 'visual'"),
        ("zero_optimization.stages=1", "unknown key 'stages'. Did you mean 'stage'"),
        ("output_dir=a", r"unknown key 'output_dir'. Did you mean 'training\.output_dir'"),
        ("training.learning_rate=NaN", r"training\.learning_rate is nan; a finite number"),
        ("training.learning_rate=1e999", r"training\.learning_rate is inf"),
        ("training.total_steps=20", r"warmup_steps=40 exceeds total_steps=20, .* add --set training\.warmup_steps=2"),
        ("training.output_dir=", r"training\.output_dir is empty. Name a path"),
        ("training.total_step=7", "unknown key 'total_step'. Did you mean 'total_steps'"),
        ("training.total_steps", "expected KEY=VALUE"),
        ("gradient_clipping.low=1", "'gradient_clipping' is no section"),
        ("total_step=7", r"Did you mean 'training\.total_steps'"),  # neither the section nor the key is right
        ("TRAINING.total_steps=7", "Did you mean 'training'"),
        ("ZERO_OPTIMIZATION.stage=1", "Did you mean 'zero_optimization'"),
        ("training.TOTAL_STEPS=7", "unknown key 'TOTAL_STEPS'. Did you mean 'total_steps'"),
        ("data.texts.train=a.txt", r'expected a list, got str .a.txt.. Write it in brackets: \["a\.txt"\]'),
        ("tr\nb=1", r"^[^\n]*--set 'tr\\nb=1': expected KEY=VALUE[^\n]*$"),  # catches a message of two lines
        ("trainin=a\nb", r"^[^\n]*unknown key 'trainin'[^\n]*$"),
    ],
)
def test_wrong_changes_are_refused(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(quickstart_mapping()))
    with pytest.raises(ConfigError, match=message):
        load_run_config(path, [change])
