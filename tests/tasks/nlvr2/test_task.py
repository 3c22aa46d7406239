"""Tests NLVR2 runs: layouts train equally, metrics are exact on any number of ranks, and runs resume."""

import json
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.config import TextTokenizerConfig, load_run_config
from beit3_ds.planner import host_requirements
from beit3_ds.sample_data.write_scenes import write_scenes
from beit3_ds.tokenizers.text import train_text_tokenizer
from tests.tasks.fine_tuning import (
    ALL,
    COVERING,
    ONE_PROCESS,
    Layout,
    WriteConfig,
    check_layout_trains_the_same,
    check_metrics_do_not_depend_on_ranks,
    check_planned_shared_memory,
    check_resumes_bit_for_bit,
    figures,
    run_mapping,
    train_layout,
    write_json,
)

VOCABULARY = 60
TASK = {"name": "nlvr2"}


def sources(scenes: Path) -> dict[str, Any]:
    files = {"format": "statement_lines", "images": str(scenes)}
    return {split: [{"path": str(scenes / f"statements-{split}.jsonl"), **files}] for split in ("train", "validation")}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, num_train=8, num_validation=5, size=32)
    settings = TextTokenizerConfig(path=str(folder / "text.spm"), vocab_size=VOCABULARY, character_coverage=1.0)
    train_text_tokenizer(settings, (folder / "text.txt").read_text().splitlines())
    return folder


@pytest.fixture(scope="module")
def write_config(scenes: Path) -> WriteConfig:
    def write(folder: Path, layout: Layout = ONE_PROCESS, **training: Any) -> Path:
        mapping = run_mapping(folder, layout, TASK, **training)
        own = mapping["beit3_ds"]
        own["model"] |= {"inputs": ["pairs"], "text_vocab_size": VOCABULARY + 4}
        own["data"] |= {"pairs": sources(scenes) | {"samples_per_step": 8}, "text_length": 24, "pair_text_length": 24}
        own["tokenizers"]["text"] = {"path": str(scenes / "text.spm"), "vocab_size": VOCABULARY}
        return write_json(folder, mapping)

    return write


@pytest.fixture(scope="module")
def one_process(write_config: WriteConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_layout(write_config, tmp_path_factory.mktemp("nlvr2") / "one")


def test_it_writes_its_results(one_process: Path) -> None:
    first = figures(one_process, "validation")[0]
    assert first["accuracy"] * 10 == pytest.approx(round(first["accuracy"] * 10))  # ten statements
    results = one_process / "run" / "validation"
    lines = (results / "predictions.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"{group}-{number}" for group in range(5) for number in (0, 1)]
    assert {line.split(",")[1] for line in lines} <= {"True", "False"}
    assert (results / "statements.html").read_text().count("<img") == 20
    summary = json.loads((one_process / "run" / "summary.json").read_text())
    assert set(summary["validation"]) == {"statement", "accuracy", "consistency"}


@pytest.mark.parametrize("layout", COVERING)
def test_layouts_train_the_same(layout: str, write_config: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_layout_trains_the_same(write_config, one_process, tmp_path / "run", COVERING[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ALL)
def test_all_layouts_train_the_same(layout: str, write_config: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_layout_trains_the_same(write_config, one_process, tmp_path / "run", ALL[layout])


def test_it_resumes_bit_for_bit(write_config: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_resumes_bit_for_bit(write_config, one_process, tmp_path / "resumed")


def test_metrics_do_not_depend_on_the_ranks(write_config: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    metrics = check_metrics_do_not_depend_on_ranks(write_config, one_process, tmp_path)
    assert set(metrics) == {"statement", "accuracy", "consistency"}


def test_the_planner_counts_both_images_of_a_sample(write_config: WriteConfig, tmp_path: Path) -> None:
    check_planned_shared_memory(write_config, tmp_path)
    node = host_requirements(load_run_config(str(write_config(tmp_path))), 1, 1)
    assert node.images_per_step == node.records_per_step == 2 * 8
