"""Provides fixtures for several folders of tests."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

# Before torch is imported. Several test processes whose threads wait for each other are ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from beit3_ds.config import RunConfig, build_run_config
from tests.built_once import build_once
from tests.deepspeed_proofs import Recorder, skip_proved
from tests.hosts import Host, missing_for_hosts, namespace_hosts
from tests.run_config import CONFIGS, small_run_mapping

if TYPE_CHECKING:
    from tests.training.steps import Reference

# Tests share their cores: the time of one example says nothing about the code.
settings.register_profile("shared cores", deadline=None)
settings.load_profile("shared cores")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option --verify-deepspeed, which `deepspeed_proofs` reads."""
    parser.addoption(
        "--verify-deepspeed",
        action="store_true",
        help="run all proofs that the pinned DeepSpeed is still wrong, and record those that pass",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Makes the process that collects all results record the proofs, and restores signals that this process ignores.

    A shell ignores SIGHUP under nohup, and SIGINT in the background. Programs that tests start would inherit that.
    """
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    if config.getoption("--verify-deepspeed") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips recorded proofs, and tests marked `gpu` on a machine without a GPU."""
    import torch

    if not config.getoption("--verify-deepspeed"):
        skip_proved(items)

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Trains a small text tokenizer on the sample captions and saves an untrained visual tokenizer.

    Returns:
        The paths of the tokenizers, by kind.
    """
    from beit3_ds.data import read_training_lines
    from beit3_ds.tokenizers import VisualTokenizer, save_visual_tokenizer, train_text_tokenizer

    def build(folder: Path) -> None:
        mapping = small_run_mapping(0)
        mapping["beit3_ds"]["tokenizers"]["text"] |= {"path": str(folder / "text.spm"), "vocab_size": 300}
        mapping["beit3_ds"]["tokenizers"]["visual"]["path"] = str(folder / "visual.safetensors")
        config = build_run_config(mapping)
        train_text_tokenizer(config.tokenizers.text, list(read_training_lines(config.data))[-800:])
        save_visual_tokenizer(config.tokenizers.visual.path, VisualTokenizer(config.tokenizers.visual, teacher_width=8))

    folder = build_once(tmp_path_factory, "tokenizers", build)
    return {"text": str(folder / "text.spm"), "visual": str(folder / "visual.safetensors")}


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> "Reference":
    """Computes the steps of every model in one process, as the reference for other layouts."""
    from tests.training.steps import MODELS, Reference

    return Reference(build_once(tmp_path_factory, "reference", lambda folder: Reference(folder).prepare(MODELS)))


@pytest.fixture
def run_mapping(tokenizer_files: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """Returns a four-step run on the sample data under ZeRO-3 that writes below `tmp_path`; tests may change it."""
    mapping = small_run_mapping(3, samples=(2, 2, 2))
    own = mapping["beit3_ds"]
    own["tokenizers"]["text"] |= {"path": tokenizer_files["text"], "vocab_size": 300}
    own["tokenizers"]["visual"]["path"] = tokenizer_files["visual"]
    own["training"] |= {
        "output_dir": str(tmp_path / "run"),
        "total_steps": 4,
        "warmup_steps": 1,
        "log_interval": 1,
        "eval_interval": 2,
        "eval_samples": 4,
        "save_interval": 1,
        "keep_checkpoints": 3,
    }
    return mapping


@pytest.fixture(scope="session")
def trained_visual_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Trains the quickstart's visual tokenizer in about a minute, for slow tests; returns its path."""
    from tests.ranks import run_ranks

    folder = tmp_path_factory.mktemp("trained_tokenizer")
    mapping = json.loads((CONFIGS / "quickstart_visual_tokenizer_cpu.json").read_text())
    path = mapping["beit3_ds"]["tokenizers"]["visual"]["path"] = str(folder / "visual.safetensors")
    mapping["beit3_ds"]["training"]["output_dir"] = str(folder / "run")
    assert run_ranks(_train, 1, build_run_config(mapping), timeout=900) == [None]
    return path


def _train(config: RunConfig) -> None:
    """Runs the trainer with one thread on one rank."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from beit3_ds.train import train_run

    train_run(config)


@pytest.fixture(scope="module")
def _module_hosts() -> Iterator[list[Host]]:
    if reason := missing_for_hosts():
        pytest.skip(reason)
    with namespace_hosts(2) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def debian_hosts() -> Iterator[list[Host]]:
    """Returns two hosts set up like Debian.

    The name of each host means a loopback address, on which gloo would listen.
    """
    if reason := missing_for_hosts():
        pytest.skip(reason)
    with namespace_hosts(2) as hosts:
        for host in hosts:
            host.add_name(f"127.0.1.1 {host.name}")
        yield hosts


@pytest.fixture
def two_hosts(_module_hosts: list[Host]) -> Iterator[list[Host]]:
    """Returns two hosts that the tests of a file share; kills processes and repairs links after each test.

    A test that crashes a host, stops its sshd or changes its names must create its own hosts with `namespace_hosts`.
    """
    yield _module_hosts
    for host in _module_hosts:
        host.clear()
        host.restore_link()
        host.throttle(None)
