"""Trains on one GPU, then on several GPUs with tensor, pipeline and data parallelism, and compares the losses."""

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from beit3_ds.benchmarks.certify.commands import ROOT, run_commands
from beit3_ds.benchmarks.certify.device_kind import kind_of
from beit3_ds.benchmarks.certify.recorder import NeedsDeviceError, Recorder
from beit3_ds.benchmarks.turns import device_of_turns
from beit3_ds.config import load_run_config
from beit3_ds.training.kernel_cache import launch_kernels

CONFIG = "ds_configs/demo_tp2_pp2_dp2_zero3.json"
"""Path of the training's config file in the repository."""

Commands = list[tuple[str, ...]]


def measure(recorder: Recorder) -> None:
    """Trains on one GPU and records the result. With more than one GPU, also trains on several GPUs and compares the
    losses.

    A dry run does not train, but launches the kernels of the training on one GPU.
    """
    is_dry = kind_of(device_of_turns()) == "dry"
    if not is_dry and not torch.cuda.is_available():
        raise NeedsDeviceError
    if not (ROOT / CONFIG).exists():
        recorder.add("training", not_run=f"{ROOT} holds no configurations; install from a clone")
        return
    if is_dry:
        recorder.measure("kernels of the training on one GPU", _launch_kernels)
        return
    importlib.import_module("deepspeed")  # if missing, the section reports this
    for name, commands in plan_commands(recorder.folder, torch.cuda.device_count()).items():
        recorder.measure(name, partial(run_commands, commands))


def _launch_kernels() -> dict[str, Any]:
    """Launches each kernel that the training run would use, on a small model and batch, in this process."""
    launch_kernels(load_run_config(str(ROOT / CONFIG), ["parallel={}"]))
    return {"ran": True}


def plan_commands(folder: Path, num_gpus: int) -> dict[str, Commands]:
    """Returns the commands to run for each measurement of this section of `beit3 certify`, by the measurement's name.

    Args:
        folder: folder for the output of the training runs.
        num_gpus: number of GPUs. The first training run uses one GPU. If `num_gpus` is above 1, a second run uses the
            largest power of two up to `num_gpus`.
    """
    beit3 = (sys.executable, "-m", "beit3_ds.cli.main")
    tokenizers = {
        "runs/quickstart/text.spm": (*beit3, "train-text-tokenizer", "ds_configs/quickstart_cpu.json"),
        "runs/quickstart/visual_tokenizer.safetensors": (
            *beit3,
            "train",
            "ds_configs/quickstart_visual_tokenizer_cpu.json",
        ),
    }
    prepare = [command for path, command in tokenizers.items() if not (ROOT / path).exists()]

    def train(name: str, ranks: int, parallel: str) -> tuple[str, ...]:
        run = (sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks))
        changes = (f"training.output_dir={folder.resolve() / name}", "training.total_steps=40", f"parallel={parallel}")
        return (*run, "--module", "beit3_ds.train", CONFIG, *(part for change in changes for part in ("--set", change)))

    planned: dict[str, Commands] = {"one GPU under ZeRO-3": [*prepare, train("one_gpu", 1, "{}")]}
    if num_gpus > 1:
        size = 1 << (num_gpus.bit_length() - 1)
        parallel = {"tensor_parallel_size": 2, "sequence_parallel": True}
        parallel["pipeline_parallel_size"] = 2 if size >= 4 else 1
        runs = (str(folder.resolve() / "one_gpu"), str(folder.resolve() / f"{size}_gpus"))
        compare = (*beit3, "compare-runs", *runs, "--tolerance", "1e-2")
        divided = train(f"{size}_gpus", size, json.dumps(parallel))
        planned[f"one GPU beside {size}, divided on every axis"] = [divided, compare]
    return planned
