"""Tests that compiling ahead of time covers exactly the kernels that trainings launch."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from triton.runtime.jit import JITFunction

from beit3_ds.benchmarks.step.batches import step_config
from beit3_ds.config import ConfigError, RunConfig
from beit3_ds.kernels.triton.fake_driver import fake_gpu
from beit3_ds.tasks import build_task
from beit3_ds.training import kernel_cache
from tests.batches import random_batch

SMALL = {"num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": 3}
LAYOUTS: dict[str, dict[str, Any]] = {
    "decoupled": {},
    "shared": {"layout": "shared", "num_vision_language_layers": 1, "sub_layernorm": False},
}


def config_of(bf16: bool = True, parallel: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    run = step_config("tiny", **(SMALL | changes))
    return kernel_cache.replace(run, deepspeed={**run.deepspeed, "bf16": {"enabled": bf16}})


def specialisations(launch: Callable[[], Any]) -> set[tuple[str, str]]:
    """Returns the name and the specialisation key of every kernel that a function launches.

    The key has the constants, types and alignments of the arguments.
    """
    found: set[tuple[str, str]] = set()
    with fake_gpu(90, compiles=False):
        keep = JITFunction._do_compile

        def record(self: Any, key: Any, *rest: Any) -> Any:
            found.add((self.__name__, str(key)))
            return keep(self, key, *rest)

        with mock.patch.object(JITFunction, "_do_compile", record):
            launch()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trainings_launch_nothing_else(layout: str) -> None:
    """Catches a layer, pass, flag or alignment that is missing from the compiled kernels."""
    config = config_of(**LAYOUTS[layout])
    model = build_task(config).build_model(None, None).to(torch.bfloat16)

    def train() -> None:
        for number in range(4):
            batch = random_batch(config.model, number + 1, 2, 2, seed=number, drop_path=True)
            model(batch, torch.ones(4)).total.backward()
            with torch.no_grad():
                model(kernel_cache.replace(batch, drop_path=None), None)

    expected = specialisations(train)
    compiled = specialisations(lambda: kernel_cache.launch_kernels(config))
    assert len(expected) > 15
    assert expected == compiled


def test_tensor_parallel_ranks_launch_their_own_widths() -> None:
    """Catches kernels compiled for undivided layers, and a process group that is left open."""
    config = config_of(hidden_size=32, num_attention_heads=2)
    parallel = kernel_cache.replace(config.parallel, tensor_parallel_size=2, sequence_parallel=True)
    divided = specialisations(lambda: kernel_cache.launch_kernels(kernel_cache.replace(config, parallel=parallel)))
    whole = specialisations(lambda: kernel_cache.launch_kernels(config))
    assert "projection_kernel" in {name for name, _ in divided - whole}
    assert not torch.distributed.is_initialized()


def test_mistakes(tmp_path: Path) -> None:
    config = config_of()
    library = kernel_cache.replace(config, training=kernel_cache.replace(config.training, kernel_backend="library"))
    with pytest.raises(ConfigError, match="runs no kernels of this project"):
        kernel_cache.fill_cache(library, 90, tmp_path, print)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        kernel_cache.fill_cache(config, 90, tmp_path / "file", print)


@pytest.mark.slow
def test_a_second_call_compiles_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "beit3_ds.cli.main", "compile-kernels", "ds_configs/quickstart_cpu.json"]
    command += ["--cache", str(tmp_path)]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert len(first.splitlines()) > 40
    assert len(second.splitlines()) == 1 and ": 0 compiled, the others were in the cache" in second
    assert first.splitlines()[-1].split()[0] == second.split()[0]  # the same number of kernels
