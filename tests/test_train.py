"""Tests whole runs of the trainer: finishing, being killed, resuming, and refusing bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.tasks.pretraining.baselines import TERM_STREAMS
from tests.preloaded import ModuleProcess, start_module
from tests.ranks import run_ranks


def write(mapping: dict[str, Any], folder: Path, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(mapping))
    return path


def start(config: Path) -> ModuleProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return start_module("beit3_ds.train", [config], env=environment, output=subprocess.PIPE)


def finish(config: Path) -> tuple[int, str]:
    process = start(config)
    output, _ = process.communicate(timeout=180)
    return process.returncode, output


def losses(folder: Path) -> list[dict[str, Any]]:
    """Returns the records of a run without times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if record["kind"] != "checkpoint"]  # written when a save ends
    wanted = {"step", "kind", "loss", "grad_norm", "learning_rate", *TERM_STREAMS}
    return [{key: value for key, value in record.items() if key in wanted} for record in records]


def test_killed_run_resumes_bit_for_bit(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Checks a run after kill -9 whose newest checkpoint is also torn: it resumes from the previous checkpoint."""
    own = run_mapping["beit3_ds"]
    own["model"]["drop_path_rate"] = 0.2  # a draw that depended on anything but the step would show
    config = write(run_mapping, tmp_path)
    status, output = finish(config)
    assert status == 0, output
    for name in ("losses.png", "predictions.html", "summary.json", "checkpoints/step-00000004/index.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000002", "step-00000003", "step-00000004"]  # keep_checkpoints is 3

    own["training"]["output_dir"] = str(tmp_path / "killed")
    config = write(run_mapping, tmp_path)
    process = start(config)
    assert process.stdout is not None
    for line in process.stdout:
        if "saved" in line and "step-00000003" in line:
            process.kill()
            break
    process.wait()
    newest = tmp_path / "killed" / "checkpoints" / "step-00000003"
    shutil.rmtree(newest.with_name("step-00000004"), ignore_errors=True)  # the kill may have come too late for it
    torn = max((path for path in newest.rglob("*.safetensors")), key=lambda path: path.stat().st_size)
    os.truncate(torn, torn.stat().st_size // 2)

    own["training"]["init_from"] = "/no/longer/there.safetensors"  # a run that has begun does not need them
    config = write(run_mapping, tmp_path)
    status, output = finish(config)
    assert status == 0, output
    assert re.search(r"step-00000003 is not whole \(.* bytes instead of", output)
    assert "resuming after step 2" in output
    assert losses(tmp_path / "killed") == losses(tmp_path / "run")


def test_run_without_a_usable_checkpoint_leaves_everything(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Catches a run that starts from the beginning and overwrites its log and damaged checkpoints."""
    run_mapping["beit3_ds"]["training"] |= {"total_steps": 2, "save_interval": 1}
    config, output_dir = write(run_mapping, tmp_path), tmp_path / "run"
    assert finish(config)[0] == 0
    for path in output_dir.glob("checkpoints/step-*/weights-00000.safetensors"):
        os.truncate(path, 100)

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}

    before = content()
    status, output = finish(config)
    assert status == 2, output
    error = output.splitlines()[-1]
    assert error.startswith("error on rank 0: none of the checkpoints in ") and "begin anew at step 0" in error
    assert all(f"step-0000000{step}: weights-00000.safetensors has 100 bytes" in error for step in (1, 2))
    assert content() == before


def train_rank(config: str) -> int:
    from beit3_ds.train import main

    return main([config])


DIVISIONS = {
    "tensor": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_parallel_size": 2},
}


@pytest.mark.parametrize("division", ["tensor", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_divided_run_lies_on_that_of_one_rank(run_mapping: dict[str, Any], tmp_path: Path, division: str) -> None:
    """Checks that two ranks that divide the model have the losses of one rank, and resume from each other's save."""
    own = run_mapping["beit3_ds"]
    run_mapping["gradient_accumulation_steps"] = 2
    own["model"] |= {"drop_path_rate": 0.2, "sub_layernorm": True}
    status, output = finish(write(run_mapping, tmp_path))
    assert status == 0, output

    own["parallel"] = DIVISIONS[division]
    own["training"]["output_dir"] = str(tmp_path / "divided")
    config = str(write(run_mapping, tmp_path, "divided.json"))
    assert run_ranks(train_rank, 2, config) == [0, 0]
    before = losses(tmp_path / "divided")
    for ours, expected in zip(losses(tmp_path / "divided"), losses(tmp_path / "run"), strict=True):
        assert ours.pop("kind") == expected.pop("kind")
        assert ours == pytest.approx(expected, rel=2e-4)
    for name in ("losses.png", "predictions.html", "summary.json"):
        assert (tmp_path / "divided" / name).stat().st_size > 0, name

    shutil.rmtree(tmp_path / "divided" / "checkpoints" / "step-00000004")
    assert run_ranks(train_rank, 2, config) == [0, 0]
    assert losses(tmp_path / "divided") == before

    shutil.rmtree(tmp_path / "divided" / "checkpoints" / "step-00000004")
    own["parallel"] = {}
    status, output = finish(write(run_mapping, tmp_path, "divided.json"))
    assert (status, "resuming after step 3" in output) == (0, True), output
    last, expected = losses(tmp_path / "divided")[-1], before[-1]
    assert last.pop("kind") == expected.pop("kind")
    assert last == pytest.approx(expected, rel=1e-5)


def test_misspelt_key_is_one_line(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    run_mapping["beit3_ds"]["model"]["hidden_sise"] = 64
    config = write(run_mapping, tmp_path)
    command = [sys.executable, "-m", "beit3_ds.cli.main", "train", str(config)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "unknown key 'hidden_sise'. Did you mean 'hidden_size'?" in line


def train_error(mapping: dict[str, Any]) -> str:
    """Returns the message of a run that must end before a process group exists."""
    import torch.distributed as dist

    from beit3_ds.config import ConfigError, build_run_config
    from beit3_ds.train import train_run

    with pytest.raises(ConfigError) as caught:
        train_run(build_run_config(mapping))
    assert not dist.is_initialized()
    return str(caught.value)


def test_missing_initial_weights_are_named(run_mapping: dict[str, Any]) -> None:
    run_mapping["beit3_ds"]["training"]["init_from"] = "/no/weights.safetensors"
    assert "there is no /no/weights.safetensors" in train_error(run_mapping)


def test_missing_data_folder_is_named(run_mapping: dict[str, Any]) -> None:
    run_mapping["beit3_ds"]["data"]["pairs"]["train"] = ["/no/such/folder/*.tar"]
    assert "/no/such/folder" in train_error(run_mapping)


def test_unwritable_output_folder_is_named(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run_mapping["beit3_ds"]["training"]["output_dir"] = str(tmp_path / "file" / "run")
    assert f"training.output_dir={tmp_path}/file/run cannot be written" in train_error(run_mapping)


def test_unreadable_shard_is_named(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    shard = tmp_path / "cut.tar"
    shutil.copy("beit3_ds/sample_data/images-validation.tar", shard)
    os.truncate(shard, 30_000)
    run_mapping["beit3_ds"]["data"]["images"]["train"] = [str(shard)]
    assert str(shard) in train_error(run_mapping)


def test_kernels_that_cannot_run_are_named(run_mapping: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from beit3_ds.kernels.ops import cuda_kernels

    run_mapping["beit3_ds"]["training"]["kernel_backend"] = "cuda"
    monkeypatch.setattr(cuda_kernels, "is_built", lambda: False)
    assert "BEIT3_BUILD_CUDA=1 pip install --no-build-isolation ." in train_error(run_mapping)
    monkeypatch.setattr(cuda_kernels, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert 'training.kernel_backend="cuda" needs a CUDA device' in train_error(run_mapping)


def test_missing_tokenizers_name_the_command(run_mapping: dict[str, Any]) -> None:
    run_mapping["beit3_ds"]["tokenizers"]["visual"]["path"] = "/no/visual.safetensors"
    assert "A run of the task visual_tokenizer trains it" in train_error(run_mapping)
    run_mapping["beit3_ds"]["tokenizers"]["text"]["path"] = "/no/text.spm"
    assert "beit3 train-text-tokenizer" in train_error(run_mapping)


def test_broken_images_stop_the_run_with_their_list(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    shard = tmp_path / "broken.tar"
    with tarfile.open(shard, "w") as archive:
        for key in range(3):
            path = tmp_path / f"image-{key}.webp"
            path.write_bytes(b"no picture")
            archive.add(path, path.name)
    run_mapping["beit3_ds"]["data"]["images"]["train"] = [str(shard)]
    run_mapping["beit3_ds"]["data"]["max_broken_records"] = 2
    status, output = finish(write(run_mapping, tmp_path))
    assert status == 2, output
    # Two per step: stops in the second, which meets the third record; the two of the first were named before.
    assert "3 broken records by step 2, more than data.max_broken_records=2" in output
    assert "left out broken record 1 of at most 2: " in output
    assert output.count(str(shard)) >= 5
    assert "Traceback" not in output
