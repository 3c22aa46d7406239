"""Tests that files of version 0.1 still load: checkpoints, exports, tokenizers and records of commit 9f7f630."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from beit3_ds.cli.main import main
from beit3_ds.config import ConfigError, build_run_config, load_run_config
from beit3_ds.config.renamed_keys import TOKENIZER_KEYS
from beit3_ds.tasks.pretraining.model import PretrainingModel
from beit3_ds.tokenizers import TextTokenizer, load_visual_tokenizer
from beit3_ds.training.comparison import compare_runs
from beit3_ds.untrusted_file import read_tensors
from tests.fixtures.old_files import (
    draw_images,
    expected_values,
    unpack_old_files,
    write_renamed_config,
    write_tokenizer_config,
)
from tests.golden.runs import find_moved, read_records
from tests.ranks import run_ranks

CHECKPOINT = "run/checkpoints/step-00000002"
EXPORTS = {
    "beit3.safetensors": "beit3",
    "unilm_dual.pth": "unilm-dual",
    "unilm_fusion.pth": "unilm-fusion",
    "timm.safetensors": "timm",
}
"""Files of exported weights, with their formats."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Returns a folder with all old files, which tests may change."""
    unpack_old_files(tmp_path)
    return tmp_path


def run_command(arguments: list[str]) -> int:
    """Runs a `beit3` command on one rank with one thread, like the program that wrote the files."""
    os.environ["OMP_NUM_THREADS"] = "1"
    return main(arguments)


def count_tensors(tensors: Mapping[str, Tensor]) -> Counter[tuple[str, torch.Size, str]]:
    """Counts tensors by dtype, shape and content, ignoring their names."""
    return Counter(
        (str(t.dtype), t.shape, hashlib.sha256(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest())
        for t in tensors.values()
    )


def read_features(path: Path) -> dict[str, Tensor]:
    """Returns the features of the expected images and sentences, from a model in the project's own format."""
    images, ids = draw_images(), [torch.tensor(ids) for ids in expected_values()["ids"]]
    model = PretrainingModel.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        features = model.encode(images[:2], ids[:2], (images[2:], [ids[1][:12], ids[2][:12]]))
    return {
        "images": features.images,
        "texts": torch.cat(list(features.texts)),
        "pair_images": features.pair_images,
        "pair_texts": torch.cat(list(features.pair_texts)),
    }


def test_run_resumes_from_old_checkpoint(old: Path) -> None:
    """Checks that the steps after an old checkpoint have the losses and norms that version 0.1 recorded."""
    unpack_old_files(old / "before")
    expected = read_records(old / "before" / "run" / "metrics.jsonl")
    assert [(record["step"], record["kind"]) for record in expected][-3:] == [
        *((3, "train"), (4, "train"), (4, "validation")),
    ]
    log = old / "run" / "metrics.jsonl"
    first, *rest = log.read_text().splitlines()
    log.write_text("\n".join([json.dumps(json.loads(first) | {"mark": 1}), *rest]) + "\n")
    assert run_ranks(run_command, 1, ["train", str(write_renamed_config(old))]) == [0]
    # A run that passed over the checkpoint would record the same losses, in a new file.
    assert "mark" in json.loads(log.read_text().splitlines()[0])
    assert not find_moved(read_records(log), expected)
    assert compare_runs(old / "before" / "run", old / "run").largest_difference("loss")[0] < 1e-4


@pytest.mark.parametrize("name", EXPORTS)
def test_old_exports_give_the_same_features(old: Path, name: str) -> None:
    path = old / name
    if name != "beit3.safetensors":
        assert main(["import", str(path), str(old / "imported.safetensors")]) == 0
        path = old / "imported.safetensors"
    found, expected = read_features(path), load_file(old / "features.safetensors")
    kinds = [key for key in expected if key.startswith(f"{name.partition('.')[0]}.")]
    assert kinds
    for key in kinds:
        torch.testing.assert_close(found[key.partition(".")[2]], expected[key])


def test_old_export_has_the_same_tensors(old: Path) -> None:
    """Checks all tensors of an old export, including heads, which features do not show; names may differ."""
    model = PretrainingModel.from_pretrained(old / "beit3.safetensors")
    assert count_tensors(dict(model.named_parameters())) == count_tensors(load_file(old / "beit3.safetensors"))


@pytest.mark.parametrize("name", EXPORTS)
def test_old_checkpoint_is_exported_alike(old: Path, name: str) -> None:
    """Compares a new export of an old checkpoint with the old export.

    Formats of other projects must have equal names and tensors. In the project's own format, names may differ.
    """
    out = old / f"again_{name}"
    dtype = "fp32" if name == "beit3.safetensors" else "fp16"
    assert main(["export", str(old / CHECKPOINT), str(out), "--format", EXPORTS[name], "--dtype", dtype]) == 0
    before, now = dict(read_tensors(old / name)), dict(read_tensors(out))
    if name == "beit3.safetensors":
        assert count_tensors(now) == count_tensors(before)
    else:
        assert now.keys() == before.keys()
        assert all(torch.equal(now[key], before[key]) for key in before)


@pytest.mark.parametrize("name", [*EXPORTS, CHECKPOINT])
def test_old_files_are_described(old: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(old / name)]) == 0
    text = capsys.readouterr().out
    assert "after 2 updates" in text and "hidden_size: 8" in text


def test_run_begins_with_old_weights(old: Path) -> None:
    """Checks that `training.init_from` takes the old export; the first evaluation must be that of the checkpoint."""
    mapping = json.loads(write_renamed_config(old).read_text())
    mapping["beit3_ds"]["training"] |= {"init_from": str(old / "beit3.safetensors"), "output_dir": str(old / "new")}
    config = old / "new.json"
    config.write_text(json.dumps(mapping))
    assert run_ranks(run_command, 1, ["train", str(config)]) == [0]
    evaluations = [record for record in read_records(old / "run" / "metrics.jsonl") if record["kind"] == "validation"]
    begun = read_records(old / "new" / "metrics.jsonl")[0]
    assert evaluations[1]["step"] == 2
    assert not find_moved([begun | {"step": 2}], [evaluations[1]])


def test_old_tokenizers_encode_alike(old: Path) -> None:
    expected = expected_values()
    text, visual = TextTokenizer(old / "text.spm"), load_visual_tokenizer(old / "visual.safetensors")
    encoded = [[text.bos_id, *text.encode(sentence), text.eos_id][:24] for sentence in expected["sentences"]]
    assert encoded == expected["ids"]
    assert visual.encode(draw_images()).tolist() == expected["codes"]


def test_old_text_tokenizer_is_not_trained_again(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks that the recorded recipe of an old text tokenizer matches the renamed configuration."""
    assert main(["train-text-tokenizer", str(write_renamed_config(old))]) == 0
    assert "already trained" in capsys.readouterr().out


def test_old_visual_tokenizer_is_not_trained_again(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks that the recorded recipe of an old visual tokenizer matches its settings in a file of their own."""
    config = write_tokenizer_config(old)
    assert main(["train", str(config)]) == 0
    assert "already trained" in capsys.readouterr().out
    assert main(["train", str(config), "--set", "training.warmup_steps=5"]) == 2
    assert "warmup_steps from 4 to 5" in capsys.readouterr().err


def test_unfinished_tokenizer_is_named(old: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Checks the message for an unfinished old tokenizer, whose checkpoint this version cannot read."""
    assert (old / "unfinished.safetensors.training.pt").exists()
    config = write_tokenizer_config(old, "unfinished.json")
    assert main(["train", str(config), "--set", f"training.output_dir={old / 'new'}"]) == 2
    assert "is an unfinished training of version 0.1" in capfd.readouterr().err


def test_old_tokenizer_keys_are_named_with_their_new_places(old: Path) -> None:
    mapping = json.loads(write_renamed_config(old).read_text())
    for key, place in TOKENIZER_KEYS.items():
        visual = mapping["beit3_ds"]["tokenizers"]["visual"] | {key: 1}
        changed = mapping | {"beit3_ds": mapping["beit3_ds"] | {"tokenizers": {"visual": visual}}}
        with pytest.raises(ConfigError, match=f"'{key}' belongs to the tokenizer's training.*{re.escape(place)}"):
            build_run_config(changed)


def test_old_keys_are_named_with_the_new_ones(old: Path) -> None:
    """Checks that the error for each key of the old configuration gives its new name."""
    with pytest.raises(ConfigError, match=r"'validation'|'cache_dir'|'init_from'"):
        load_run_config(old / "config.json")
    renamed = write_renamed_config(old).read_text()
    for key, now in (("heldout", "validation"), ("prepared_dir", "cache_dir"), ("initial_weights", "init_from")):
        assert f'"{key}"' in (old / "config.json").read_text()
        with pytest.raises(ConfigError, match=f"'{key}'.*'{now}'"):
            build_run_config(json.loads(renamed.replace(f'"{now}"', f'"{key}"')))
