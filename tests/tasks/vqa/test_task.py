"""Tests VQA runs: layouts train equally, metrics are exact on any number of ranks, and runs resume."""

import json
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.config import TextTokenizerConfig
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
    run_mapping,
    train_layout,
    write_json,
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, num_train=12, num_validation=4, size=32)
    settings = TextTokenizerConfig(path=str(folder / "text.spm"), vocab_size=66, character_coverage=1.0)
    train_text_tokenizer(settings, (folder / "text.txt").read_text().splitlines())
    return folder


@pytest.fixture(scope="module")
def write_config(scenes: Path) -> WriteConfig:
    def write(folder: Path, layout: Layout = ONE_PROCESS, **training: Any) -> Path:
        mapping = run_mapping(
            folder, layout, {"name": "vqa", "num_answers": 20, "min_answer_occurrences": 1}, **training
        )
        own = mapping["beit3_ds"]

        def source(split: str) -> dict[str, str]:
            path = str(scenes / f"questions-{split}.jsonl")
            return {"path": path, "format": "vqa_lines", "images": str(scenes)}

        own["model"] |= {"inputs": ["pairs"], "final_norm": False, "text_vocab_size": 70}
        own["data"]["pairs"] = {
            "train": [source("train")],
            "validation": [source("validation")],
            "samples_per_step": 8,
        }
        own["tokenizers"]["text"] = {"path": str(scenes / "text.spm"), "vocab_size": 66}
        return write_json(folder, mapping)

    return write


@pytest.fixture(scope="module")
def one_process(write_config: WriteConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_layout(write_config, tmp_path_factory.mktemp("vqa") / "one")


def test_it_writes_its_results(one_process: Path) -> None:
    folder = one_process / "run" / "validation"
    results = json.loads((folder / "results.json").read_text())
    assert len(json.loads((folder / "submission.json").read_text())) == results["num_questions"]
    assert "data:image/jpeg" in (folder / "answers.html").read_text()


@pytest.mark.parametrize("layout", COVERING)
def test_layouts_train_the_same(layout: str, write_config: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_layout_trains_the_same(write_config, one_process, tmp_path / "run", COVERING[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ALL)
def test_all_layouts_train_the_same(layout: str, write_config: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_layout_trains_the_same(write_config, one_process, tmp_path / "run", ALL[layout])


def test_it_resumes_bit_for_bit(write_config: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_resumes_bit_for_bit(write_config, one_process, tmp_path / "resumed")


def test_the_planner_counts_the_images_of_prefetched_steps(write_config: WriteConfig, tmp_path: Path) -> None:
    check_planned_shared_memory(write_config, tmp_path)


def test_metrics_do_not_depend_on_the_ranks(write_config: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    metrics = check_metrics_do_not_depend_on_ranks(write_config, one_process, tmp_path)
    assert {"accuracy", "answers", "accuracy/answer/number"} <= metrics.keys()
