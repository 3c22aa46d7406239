"""Runs the README's commands for every shipped GPU configuration, with small files in place of its data."""

import io
import os
import re
import shlex
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit3_ds.cli.main import main
from beit3_ds.config import RunConfig, load_run_config
from tests.config.test_ds_configs import WORLD_SIZES
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
GPU_CONFIGS = [
    name
    for name in WORLD_SIZES
    if load_run_config(ROOT / f"ds_configs/{name}.json").deepspeed.get("bf16", {}).get("enabled")
]
WORDS = [
    "red",
    "bird",
    "sits",
    "left",
    "of",
    "two",
    "green",
    "boats",
    "near",
    "water",
    "old",
    "trees",
    "in",
    "snow",
    "under",
    "a",
    "bright",
    "evening",
    "sky",
]

# Smaller in every respect, but with the layout, the ZeRO stage, the precision and the file names of the shipped file.
SMALLER = [
    *("model.num_layers=6", "model.hidden_size=16", "model.ffn_hidden_size=32", "model.num_attention_heads=4"),
    *("model.image_size=32", "model.patch_size=8", "model.text_vocab_size=46", "model.visual_vocab_size=16"),
    *("tokenizers.text.vocab_size=36", "tokenizers.text.character_coverage=1.0"),
    *(f"data.{stream}.samples_per_step=16" for stream in ("images", "pairs", "texts")),
]
SMALLER_TOKENIZER = [
    *("tokenizers.visual.image_size=32", "tokenizers.visual.patch_size=8", "tokenizers.visual.hidden_size=16"),
    *("tokenizers.visual.num_layers=1", "tokenizers.visual.decoder_layers=1"),
    *("tokenizers.visual.num_attention_heads=2", "tokenizers.visual.codebook_size=16", "data.num_workers=0"),
    *("training.total_steps=2", "training.warmup_steps=1", "training.log_interval=1", "training.eval_samples=8"),
]
TOKENIZER = "ds_configs/visual_tokenizer_8gpu.json"


def layout_changes(config: RunConfig) -> tuple[int, list[str]]:
    """Returns settings for a layout of at most 4 ranks that is divided along the same axes."""
    sizes = [min(2, config.parallel.tensor_parallel_size), min(2, config.parallel.pipeline_parallel_size)]
    accumulation = min(4, config.gradient_accumulation_steps)
    names = ("parallel.tensor_parallel_size", "parallel.pipeline_parallel_size")
    changes = [f"{name}={size}" for name, size in zip(names, sizes, strict=True)]
    return max(2, sizes[0] * sizes[1]), [*changes, f"gradient_accumulation_steps={accumulation}"]


def sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(np.array(WORDS), rng.integers(4, 14)))


def write_tar(path: Path, rng: np.random.Generator, count: int = 12) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(buffer, "jpeg")
            for extension, data in (("jpg", buffer.getvalue()), ("txt", sentence(rng).encode())):
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def write_stand_in(config: RunConfig) -> None:
    """Writes two small files for each file pattern of the configuration, below the working directory."""
    rng = np.random.default_rng(0)
    for name, stream in config.data.streams().items():
        for source in (*stream.train, *stream.validation):
            for number in range(2):
                path = Path(source.path.replace("*", f"{number:05d}"))
                assert not path.is_absolute() and "*" in source.path
                path.parent.mkdir(parents=True, exist_ok=True)
                if name == "texts":
                    path.write_text("\n\n".join(sentence(rng) + "." for _ in range(150)), encoding="utf-8")
                elif not path.exists():
                    write_tar(path, rng)


def readme_commands(name: str) -> Iterator[list[str]]:
    """Yields the README's commands for base_8gpu.json and its visual tokenizer, adapted to another configuration."""
    (block,) = (
        found
        for found in re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        if "beit3 check ds_configs/base_8gpu.json" in found
    )
    for line in block.splitlines():
        command = shlex.split(line, comments=True)
        if "ds_configs/base_8gpu.json" in command or TOKENIZER in command:
            yield [word.replace("base_8gpu", name) for word in command]


def train_rank(module: str, arguments: list[str], folder: str) -> int:
    import importlib

    os.chdir(folder)
    return int(importlib.import_module(module).main(arguments))


@pytest.mark.parametrize(
    "name", [name if name == "base_8gpu" else pytest.param(name, marks=pytest.mark.slow) for name in GPU_CONFIGS]
)
def test_the_readmes_commands(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    path = f"ds_configs/{name}.json"
    config = load_run_config(path)
    write_stand_in(config)
    write_stand_in(load_run_config(TOKENIZER))
    num_ranks, layout = layout_changes(config)
    changes = [f"--set={change}" for change in [*SMALLER, *SMALLER_TOKENIZER, *layout]]
    images = ["task.teacher=oriented_gradients", "data.images.samples_per_step=8"]
    tokenizer_changes = [f"--set={change}" for change in [*SMALLER_TOKENIZER, *images]]
    commands = list(readme_commands(name))
    verbs = [command[1:3] if command[1] == "prepare" else command[1:2] for command in commands if command[0] == "beit3"]
    assert verbs == [
        ["check"],
        ["prepare", "index"],
        ["prepare", "stats"],
        ["train-text-tokenizer"],
        ["prepare", "texts"],
    ]
    for command in commands:
        if command[0] == "beit3":
            if command[1] == "check":
                command[command.index("--world-size") + 1] = str(WORLD_SIZES[name])
                assert main(command[1:]) == 0  # the shipped file as it is, before it is made smaller
                command[command.index("--world-size") + 1] = str(num_ranks)
            # catches a command that the config cannot run, and an order in which one needs what a later one makes
            assert main([*command[1:], *changes]) == 0, command
            continue
        module = command[command.index("--module") + 1]
        arguments = [TOKENIZER, *tokenizer_changes] if TOKENIZER in command else [path, *changes]
        assert run_ranks(train_rank, num_ranks, module, arguments, str(tmp_path)) == [0] * num_ranks, command
    assert (tmp_path / config.training.output_dir / "summary.json").exists()
    assert list((tmp_path / "data/prepared/texts").glob("*.borders"))
    assert "not prepared yet" in capsys.readouterr().out
