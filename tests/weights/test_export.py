"""Tests exported files: whole or absent, with the chosen dtype and number of files, and little memory use."""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from beit3_ds.checkpoint.slices import TensorSlice
from beit3_ds.checkpoint.tensor_file import TensorEntry, write_tensor_file
from beit3_ds.config import ConfigError
from beit3_ds.model import PretrainedWeights
from beit3_ds.model.adaptation import AdaptedWeights, fill_parameters
from beit3_ds.model.pretrained import INDEX_NAME
from beit3_ds.tasks.pretraining.model import PretrainingModel
from beit3_ds.weights import export as export_module
from beit3_ds.weights.export import ExportFormat, export_weights, format_bytes, parse_byte_count
from tests.batches import small_model_config
from tests.file_state import file_state
from tests.ranks import run_ranks
from tests.weights.models import ModelReader, random_model

FORMATS: tuple[ExportFormat, ...] = ("beit3", "unilm-dual", "unilm-fusion", "timm")
READER = ModelReader(random_model(small_model_config()))


def tensors_of(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        return {name: x for file in path.glob("*.safetensors") for name, x in load_file(file).items()}
    return torch.load(path, weights_only=True)["model"] if path.suffix == ".pth" else load_file(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_tensors_are_cast(format: ExportFormat, dtype: torch.dtype, tmp_path: Path) -> None:
    suffix = ".pth" if format.startswith("unilm") else ".safetensors"
    whole, cast = tmp_path / f"whole{suffix}", tmp_path / f"cast{suffix}"
    export_weights(READER, whole, format=format)
    export_weights(READER, cast, format=format, dtype=dtype)
    expected, found = tensors_of(whole), tensors_of(cast)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == torch.float32
        assert found[name].dtype == dtype and torch.equal(found[name], tensor.to(dtype)), name


def test_numbers_too_large_for_a_type_are_refused(tmp_path: Path) -> None:
    model = random_model(small_model_config())
    with torch.no_grad():
        model.heads.mim.bias[3] = -1e6
    with pytest.raises(ConfigError, match=r"heads.mim.bias.*-1e\+06.*float16"):
        export_weights(ModelReader(model), tmp_path / "weights", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    export_weights(ModelReader(model), tmp_path / "weights", dtype=torch.bfloat16)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limit=st.integers(1, 150_000))
def test_shards_keep_to_their_limit(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # thousands of small files
    folder = tmp_path / "shards"
    done = export_weights(READER, folder, max_shard_bytes=limit, overwrite=True)
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    index = json.loads((folder / INDEX_NAME).read_text())
    for file in files:
        shard = load_file(file)
        assert {name for name, place in index["weight_map"].items() if place == file.name} == shard.keys()
        assert sum(x.numel() * 4 for x in shard.values()) <= limit or len(shard) == 1
    found = tensors_of(folder)
    assert index["metadata"]["total_size"] == sum(x.numel() * 4 for x in found.values())
    assert found.keys() == set(READER.names()) and all(torch.equal(x, READER.read(n)) for n, x in found.items())
    assert (done.num_files, done.num_bytes) == (len(files), sum(file.stat().st_size for file in files))
    assert list(tmp_path.iterdir()) == [folder]  # nothing half-written is left beside it


def test_names_and_shards_suit_the_readers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        export_weights(READER, tmp_path / "vision.pth", format="timm")
    with pytest.raises(ConfigError, match=r"--max-shard-size: readers of unilm-dual load a single file"):
        export_weights(READER, tmp_path / "x", format="unilm-dual", max_shard_bytes=1000)


@pytest.mark.parametrize("max_shard_bytes", [None, 50_000], ids=["file", "shards"])
@pytest.mark.parametrize("taken_by", ["file", "shards"])
def test_nothing_is_overwritten_unasked(taken_by: str, max_shard_bytes: int | None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = ModelReader(random_model(small_model_config(), seed=1))
    export_weights(other, out, max_shard_bytes={"file": None, "shards": 30_000}[taken_by])
    with pytest.raises(ConfigError, match=r"exists already.*--force"):
        export_weights(READER, out, max_shard_bytes=max_shard_bytes)
    assert torch.equal(PretrainedWeights(out).read("heads.mim.bias"), other.read("heads.mim.bias"))
    export_weights(READER, out, max_shard_bytes=max_shard_bytes, overwrite=True)
    assert torch.equal(PretrainedWeights(out).read("heads.mim.bias"), READER.read("heads.mim.bias"))
    assert out.is_dir() == (max_shard_bytes is not None) and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("name", ["text.spm", "model-00001-of-00009.safetensors", "notes"])
def test_a_folder_with_other_files_is_never_replaced(name: str, tmp_path: Path) -> None:
    """Checks that an export refuses a folder with exported weights and other files.

    The other file is a tokenizer, another project's shard or a folder.
    """
    folder = tmp_path / "shards"
    export_weights(READER, folder, max_shard_bytes=20_000)
    export_weights(READER, folder, max_shard_bytes=20_000, overwrite=True)
    if name == "notes":
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(b"mine")
    with pytest.raises(ConfigError, match=f"not one of exported weights alone and holds {name}"):
        export_weights(READER, folder, max_shard_bytes=20_000, overwrite=True)
    assert (folder / name).exists()


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("words")
    with pytest.raises(ConfigError, match="not one of exported weights"):
        export_weights(READER, precious, max_shard_bytes=1000, overwrite=True)
    assert (precious / "chapter.txt").read_text() == "words"


class FailingReader(ModelReader):
    """Fails at the n-th tensor, like a damaged file."""

    def __init__(self, error: BaseException, after: int) -> None:
        super().__init__(random_model(small_model_config()))
        self.error, self.left = error, after

    def read(self, name: str, part: TensorSlice | None = None) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().read(name, part)


@pytest.mark.parametrize(
    ("error", "seen", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            ConfigError,
            r"out\.safetensors cannot be written.*No space left",
        ),
        (KeyboardInterrupt("by hand"), KeyboardInterrupt, "by hand"),
    ],
    ids=["full", "interrupted"],
)
@pytest.mark.parametrize("format", FORMATS)
def test_what_fails_leaves_the_old_file(
    format: ExportFormat, error: BaseException, seen: type[BaseException], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    export_weights(READER, out, format=format)
    before = out.read_bytes()
    with pytest.raises(seen, match=message):
        export_weights(FailingReader(error, after=20), out, format=format, overwrite=True)
    assert list(tmp_path.iterdir()) == [out] and out.read_bytes() == before


def test_a_full_disk_is_an_error_before_the_mapping_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)  # without the call, a full disk ends the process with SIGBUS
    with pytest.raises(ConfigError, match="No space left"):
        export_weights(READER, tmp_path / "out.pth", format="unilm-dual")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1.5k", 1500), ("7", 7), ("1 TB", 10**12)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_byte_count(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 GG", "0", "1e9", "five"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size in bytes"):
        parse_byte_count(text)


def test_sizes_are_written_for_people() -> None:
    assert [format_bytes(count) for count in (999, 1000, 2.5e9, 7e15)] == ["999 bytes", "1.0 kB", "2.5 GB", "7000.0 TB"]


MEGABYTE = 1 << 20


class LargeReader:
    """Simulates a reader of 216 MB in 6 tensors, each created when it is read."""

    model, step = small_model_config(num_layers=6, num_vision_language_layers=0), 0
    task = None

    def names(self) -> list[str]:
        return [f"tensor.{number}" for number in range(6)]

    def shape(self, name: str) -> torch.Size:
        return torch.Size((9 * MEGABYTE,))

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, part: TensorSlice | None = None) -> Tensor:
        return torch.full((9 * MEGABYTE,) if part is None else part.shape, 0.5)


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Provides a function that returns the peak of private memory since the start, in bytes.

    Pages of mapped files are not counted, because the system may drop them at any time.
    """

    def private() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    first, peak, done = private(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], private() - first)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: max(peak[0], private() - first)
    finally:
        done.set()
        watcher.join()


@pytest.mark.parametrize("kind", ["file", "shards", "state dict"])
def test_memory_stays_far_below_a_tensor(kind: str, tmp_path: Path) -> None:
    (peak,) = run_ranks(measure_export, 1, kind, tmp_path)  # a process in which no other test has kept memory
    assert peak < 24 * MEGABYTE  # catches an export that reads a whole tensor of 36 MB


def measure_export(kind: str, folder: Path) -> int:
    """Exports six tensors of 36 MB; returns the peak of private memory in bytes."""
    reader = LargeReader()
    torch.save({}, folder / "first")  # imports 80 MB of torch
    if kind == "state dict":  # the writer, without the names of a model
        planned = [export_module.plan_copy(reader, name) for name in reader.names()]
        export_module.plan_unilm_export = lambda *_, **__: planned
    with peak_memory() as peak:
        export_weights(
            reader,
            folder / "out",
            format="unilm-dual" if kind == "state dict" else "beit3",
            max_shard_bytes=80 * MEGABYTE if kind == "shards" else None,
        )
    return peak()


def test_loading_takes_one_copy(tmp_path: Path) -> None:
    config = small_model_config(hidden_size=512, num_attention_heads=8, ffn_hidden_size=2048, num_layers=3)
    model = random_model(config)
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    export_weights(ModelReader(model), tmp_path / "weights")
    export_weights(READER, tmp_path / "small")
    PretrainingModel.from_pretrained(tmp_path / "small")  # imports 35 MB of torch
    with peak_memory() as peak:
        loaded = PretrainingModel.from_pretrained(tmp_path / "weights")
    assert size > 60 * MEGABYTE and peak() < 1.2 * size
    weights = PretrainedWeights(tmp_path / "weights")
    with peak_memory() as peak:
        fill_parameters(loaded, AdaptedWeights(weights, weights.model, "weights"))
    assert peak() < 0.2 * size


@pytest.mark.parametrize("kind", ["text", "checkpoint's file", "released", "link", "dangling", "device", "pipe"])
def test_force_replaces_nothing_that_no_export_wrote(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    match kind:
        case "text":
            out.write_text("mine")
        case "checkpoint's file":
            write_tensor_file(out, [TensorEntry("x", torch.float32, (2,))], lambda name: [torch.zeros(2)], {})
        case "released":
            torch.save({"model": {"x": torch.zeros(2)}}, out)
        case "link":
            export_weights(READER, tmp_path / "linked")
            out.symlink_to("linked")
        case "dangling":
            out.symlink_to("nowhere")
        case "device":
            out = Path("/dev/null")
        case "pipe":
            os.mkfifo(out)
    before = file_state(out)
    with pytest.raises(ConfigError, match="no export or import of this program wrote it"):
        export_weights(READER, out, overwrite=True)
    assert file_state(out) == before


def test_nothing_is_written_into_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ConfigError, match="inside a checkpoint"):
        export_weights(READER, tmp_path / "weights-00000.safetensors", overwrite=True)


@pytest.mark.parametrize("format", FORMATS)
def test_force_replaces_an_export(format: ExportFormat, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    export_weights(READER, out, format=format)
    export_weights(READER, out, format="beit3", overwrite=True)
    assert list(tmp_path.iterdir()) == [out]
