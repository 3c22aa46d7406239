"""Tests captioning runs: layouts train equally, captions do not depend on the number of ranks, and runs resume."""

import json
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.config import TextTokenizerConfig
from beit3_ds.sample_data.write_scenes import write_scenes
from beit3_ds.tokenizers.text import train_text_tokenizer
from tests.ranks import run_ranks
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
    evaluate,
    figures,
    run_mapping,
    train_layout,
    write_json,
)

VOCABULARY = 66
TASK: dict[str, Any] = {"name": "captioning", "dropped_share": 0.2, "drop_after_steps": 2, "generation": "never"}


def sources(scenes: Path) -> dict[str, Any]:
    source = {"path": str(scenes / "captions.json"), "format": "karpathy", "images": str(scenes)}
    return {"train": [source | {"split": "train"}], "validation": [source | {"split": "val"}]}


def writing(write_config: WriteConfig) -> WriteConfig:
    """Writes configurations of runs that generate captions."""

    def write(folder: Path, layout: Layout = ONE_PROCESS, **training: Any) -> Path:
        mapping = json.loads(write_config(folder, layout, **training).read_text())
        mapping["beit3_ds"]["task"] |= {"generation": "at_end", "max_length": 8, "official_scores": False}
        return write_json(folder, mapping)

    return write


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
    return train_layout(write_config, tmp_path_factory.mktemp("captioning") / "one")


def test_it_measures_masked_words(one_process: Path) -> None:
    first = figures(one_process, "validation")[0]
    assert set(first) == {"words", "word_accuracy"}
    # Before training all of 70 words are equally likely: log 70 = 4.2, less the entropy of the smoothed labels.
    assert 3 < first["words"] < 5


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


def test_captions_do_not_depend_on_the_ranks(
    write_config: WriteConfig, one_process: Path, scenes: Path, tmp_path: Path
) -> None:
    metrics = check_metrics_do_not_depend_on_ranks(writing(write_config), one_process, tmp_path)
    assert set(metrics) == {"words", "word_accuracy", "ended", "exact_match"}
    written = tmp_path / "1" / "out"
    images = json.loads((scenes / "captions.json").read_text())["images"]
    captions = json.loads((written / "captions.json").read_text())
    assert [entry["image_id"] for entry in captions] == [entry["cocoid"] for entry in images if entry["split"] == "val"]
    assert (written / "captions.html").read_text().count("<img") == 5


def test_tensor_parallel_ranks_write_the_same_captions(
    write_config: WriteConfig, one_process: Path, tmp_path: Path
) -> None:
    weights, written = str(one_process / "run"), []
    for ranks in (1, 2):
        layout: Layout = (ranks, 0, 1, {"tensor_parallel_size": ranks})
        mapping = json.loads(writing(write_config)(tmp_path / str(ranks), layout).read_text())
        mapping["beit3_ds"]["task"]["length_penalty"] = 10.0  # longer captions than a model of four steps would write
        config = write_json(tmp_path / str(ranks), mapping)
        arguments = [str(config), "--weights", weights, "--out", str(tmp_path / str(ranks) / "out")]
        assert run_ranks(evaluate, ranks, arguments) == [0] * ranks
        written.append(json.loads((tmp_path / str(ranks) / "out" / "captions.json").read_text()))
    assert written[0] == written[1]
    assert all(entry["caption"] for entry in written[0])


def test_layouts_that_cannot_write_captions_say_so(
    write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_layout(writing(write_config), tmp_path / "run", (1, 3, 1, {}), total_steps=1, eval_interval=1)
    assert "captions: none are written, because ZeRO-3 divides the parameters" in capfd.readouterr().out
    assert not (tmp_path / "run" / "run" / "validation" / "captions.json").exists()
