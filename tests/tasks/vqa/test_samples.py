"""Tests the samples of VQA; mistakes in files are reported before training, with file and entry."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from beit3_ds.config import ConfigError, TextTokenizerConfig, build_run_config
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.samples import SampleKey
from beit3_ds.tasks import RankShare, build_task
from beit3_ds.tasks.vqa.head import ANSWER_SCORES
from beit3_ds.tasks.vqa.packing import QUESTION_INDICES, pack
from beit3_ds.tasks.vqa.task import Vqa, VqaRankTask
from beit3_ds.tokenizers.text import train_text_tokenizer
from tests.tasks.fine_tuning import ONE_PROCESS, run_mapping

LINES = [
    {"id": 7, "image": "a.png", "question": "what color is it", "answers": ["red", "red", "blue"]},
    {"id": 8, "image": "b.png", "question": "is it red", "answers": ["yes"]},
    {"id": 9, "image": "b.png", "question": "is it blue", "answers": ["no"]},
]
OTHER = [{"id": 1, "image": "c.png", "question": "is it red", "answers": ["purple"]}]
SHARE = RankShare(data_parallel_rank=0, data_parallel_size=1, embeds=True, predicts=True, reads=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("tokenizer") / "text.spm")
    settings = TextTokenizerConfig(path=path, vocab_size=20, character_coverage=1.0)
    train_text_tokenizer(settings, ["what color is it", "is it red", "is it blue"] * 3)
    return path


class Files:
    """Writes questions and images into a folder, and opens the VQA task on them."""

    def __init__(self, folder: Path, tokenizer: str) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        for number, name in enumerate("abcd"):
            Image.new("RGB", (40, 30), (60 * number, 0, 0)).save(folder / f"{name}.png")

    def source(self, name: str, lines: Sequence[dict[str, Any]], **keys: str) -> dict[str, str]:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {"path": str(path), "format": "vqa_lines", "images": str(self.folder), **keys}

    def build(self, stream: dict[str, Any], **settings: Any) -> Vqa:
        task = {"name": "vqa", "num_answers": 3, "min_answer_occurrences": 1, **settings}
        mapping = run_mapping(self.folder, ONE_PROCESS, task)
        own = mapping["beit3_ds"]
        own["model"] |= {"inputs": ["pairs"], "text_vocab_size": 30}
        own["data"]["pairs"] = {"samples_per_step": 2, **stream}
        own["tokenizers"]["text"] = {"path": self.tokenizer, "vocab_size": 20}
        built = build_task(build_run_config(mapping))
        assert isinstance(built, Vqa)
        return built

    def open(self, stream: dict[str, Any], share: RankShare = SHARE, **settings: Any) -> VqaRankTask:
        (self.folder / "run").mkdir(exist_ok=True)
        return self.build(stream, **settings).open(share)


@pytest.fixture
def files(tmp_path: Path, tokenizer: str) -> Files:
    return Files(tmp_path, tokenizer)


def test_samples_have_soft_targets_and_numbers(files: Files) -> None:
    opened = files.open({"train": [files.source("train", LINES)], "validation": [files.source("val", OTHER)]})
    assert opened.vocabulary is not None and list(opened.vocabulary) == ["red", "yes", "no"]
    ((_, samples),) = [item for item in opened.sources.items() if ".train" in item[0]]
    sample = samples.prepare(0, SampleKey(1, "pairs", 0, 0))
    torch.testing.assert_close(sample.scores, torch.tensor([1.0, 0.0, 0.0]))
    assert sample.view.shape == (3, 32, 32) and sample.sample_index == 0
    (batch,) = opened.evaluation["validation"]
    assert batch.targets[ANSWER_SCORES].tolist() == [[0, 0, 0]]  # an answer out of the list still counts as a question
    assert batch.term_counts == (1, 1) and batch.targets[QUESTION_INDICES].tolist() == [0]
    assert batch.head_rows is not None and batch.head_rows.tolist() == [0]


def test_a_side_in_an_answer_keeps_the_image_unflipped(files: Files) -> None:
    """Checks that an image is not flipped if only an answer names a side, because a flip would make it wrong."""
    lines = [{"id": 1, "image": "a.png", "question": "is it red", "answers": ["left"]}, *LINES[:2]]
    opened = files.open({"train": [files.source("train", lines)]})
    (samples,) = opened.sources.values()
    chosen: list[tuple[str, ...]] = []

    class Recorder:
        min_side = None

        def of(self, *texts: str) -> Any:
            chosen.append(texts)
            return samples.view.of(*texts)

    dataclasses.replace(samples, view=Recorder()).prepare(0, SampleKey(1, "pairs", 0, 0))
    assert chosen == [("is it red", "left")]


def test_an_empty_batch_is_whole(files: Files) -> None:
    model = files.build({"train": [files.source("train", LINES)]}).config.model
    batch = pack([], None, {}, model, 3, embeds=True, predicts=True)
    assert batch.targets[ANSWER_SCORES].shape == (0, 3) and batch.pixels is not None
    assert batch.num_rows == 0 and batch.term_counts == (0, 0)


def without(line: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != key}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*LINES, LINES[0]], r"train\.jsonl:4: the question id 7 occurs twice"),
        ([LINES[0], LINES[1] | {"image": "gone.png"}], r"lacks 1 of 2 images.*train\.jsonl:2 \(gone\.png\)"),
        ([LINES[0] | {"question": "  "}], r"train\.jsonl:1 \(a\.png\): broken caption.*empty"),
        ([without(line, "answers") for line in LINES], r"train\.jsonl have no answers"),
        ([], r"train\.jsonl has no questions"),
    ],
)
def test_bad_files_are_named(files: Files, lines: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        files.open({"train": [files.source("train", lines)]})


def test_validation_needs_answers_but_a_test_split_does_not(files: Files) -> None:
    questions = files.source("test", [without(OTHER[0], "answers")])
    train = files.source("train", LINES)
    with pytest.raises(ConfigError, match=r"test\.jsonl have no answers, as those of a test split"):
        files.open({"train": [train], "validation": [questions]})
    share = RankShare(
        data_parallel_rank=0, data_parallel_size=1, embeds=True, predicts=True, reads=True, splits=("test",)
    )
    task = files.build({"train": [train], "test": [questions]})
    task.adopt_weights({"name": "vqa", "answers": ["red", "yes", "no"]}, "weights")
    assert len(task.open(share).evaluation["test"]) == 1
    with pytest.raises(ConfigError, match="have no list of answers"):
        files.open({"train": [train], "test": [questions]}, share)


def test_ids_of_an_evaluation_differ_over_sources(files: Files) -> None:
    validation = [files.source("one", OTHER), files.source("two", OTHER)]
    with pytest.raises(ConfigError, match=r"two\.jsonl:1 .* has the id 1, as has .*one\.jsonl:1"):
        files.open({"train": [files.source("train", LINES)], "validation": validation})


def test_shared_images_are_counted(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    shared = [OTHER[0] | {"image": "b.png"}]
    files.open({"train": [files.source("train", LINES)], "validation": [files.source("val", shared)]})
    assert "WARNING: 1 of 1 images of validation are also images of train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"format": "coco"}, r"data\.pairs: the task vqa does not take .* of format coco\. It takes pairs: vqav2, "),
        ({"images": ""}, r"needs 'images'"),
        ({"annotations": "b.json"}, "answers in the same file"),
        ({"format": "visual_genome_questions"}, "needs 'annotations': the path of image_data.json"),
    ],
)
def test_keys_of_sources_are_checked(files: Files, keys: dict[str, str], message: str) -> None:
    source = {name: value for name, value in (files.source("train", LINES) | keys).items() if value}
    with pytest.raises(ConfigError, match=message):
        files.open({"train": [source]})


def test_the_list_of_answers_belongs_to_the_weights(files: Files) -> None:
    stream = {"train": [files.source("train", LINES)]}
    task = files.build(stream)
    task.adopt_weights({"name": "vqa", "answers": ["red", "no", "yes"]}, "training.init_from=x")
    with pytest.raises(ConfigError, match=r"answers of training\.init_from=x are not those.*answer 1 is 'no' there"):
        task.open(SHARE)
    with pytest.raises(ConfigError, match=r"num_answers=4, but .* give 3 answers\. Set it to 3"):
        files.open(stream, num_answers=4)
    files.open(stream)
    (files.folder / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    files.open(stream)  # the same list
    changed = [LINES[1], LINES[0], LINES[2]]
    with pytest.raises(ConfigError, match=r"checkpoints in .* belong to the answers in .*answers\.jsonl"):
        files.open({"train": [files.source("train", changed)]})
    own = str(files.folder / "run" / "answers.jsonl")
    files.open({"train": [files.source("train", changed)]}, answer_list=own)


def test_an_unreadable_image_is_a_broken_record(files: Files) -> None:
    opened = files.open({"train": [files.source("train", LINES)]})
    (files.folder / "a.png").write_bytes(b"no image")
    ((_, samples),) = opened.sources.items()
    with pytest.raises(BrokenRecordError, match=r"train\.jsonl:1 \(a\.png\): broken image"):
        samples.prepare(0, SampleKey(1, "pairs", 0, 0))
