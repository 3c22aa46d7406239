"""Tests that runs on texts only or images only need neither the other tokenizer nor its data."""

import json
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.cli import main as cli
from tests.ranks import run_ranks
from tests.test_train import finish, train_rank, write

OTHERS = {"texts": "visual", "images": "text"}
TERMS = {"texts": "text_mlm", "images": "image_mim"}


def keep_only(mapping: dict[str, Any], stream: str) -> None:
    """Reduces a run's configuration to one stream and two steps, without the tokenizer of the other modality."""
    own = mapping["beit3_ds"]
    own["data"] = {key: value for key, value in own["data"].items() if key not in ("images", "pairs", "texts")} | {
        stream: own["data"][stream]
    }
    own["model"]["inputs"] = [stream]
    if stream in OTHERS:
        del own["tokenizers"][OTHERS[stream]]
    own["training"] |= {"total_steps": 2, "save_interval": 2}


def check_results(folder: Path, stream: str) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["validation"]) == [TERMS[stream]]
    assert summary["validation"][TERMS[stream]]["unigram_entropy"] >= 0  # an untrained tokenizer may have one code
    assert Path(summary["predictions"]).stat().st_size > 0
    assert ("visual_tokenizer_teacher" in summary and summary["visual_tokenizer_teacher"] is not None) == (
        stream == "images"
    )
    index = json.loads((folder / "checkpoints" / "step-00000002" / "index.json").read_text())
    assert list(index["tokenizers"]) == [{"texts": "text", "images": "visual"}[stream]]


@pytest.mark.parametrize("stream", ["texts", pytest.param("images", marks=pytest.mark.slow)])
def test_trains_evaluates_and_resumes_alone(run_mapping: dict[str, Any], tmp_path: Path, stream: str) -> None:
    keep_only(run_mapping, stream)
    config = write(run_mapping, tmp_path)
    assert cli.main(["check", str(config)]) == 0
    status, output = finish(config)
    assert status == 0, output
    check_results(tmp_path / "run", stream)
    run_mapping["beit3_ds"]["training"]["total_steps"] = 3
    run_mapping["beit3_ds"]["data"]["num_workers"] = 1  # which must hand over empty parts of a batch
    status, output = finish(write(run_mapping, tmp_path))
    assert status == 0 and "resuming after step 2" in output, output


@pytest.mark.slow
@pytest.mark.parametrize("division", [{}, {"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2}])
@pytest.mark.parametrize("stream", ["texts", "images"])
def test_two_ranks_train_alone(
    run_mapping: dict[str, Any], tmp_path: Path, stream: str, division: dict[str, int]
) -> None:
    keep_only(run_mapping, stream)
    run_mapping["gradient_accumulation_steps"] = 2 if division else 1
    run_mapping["beit3_ds"]["parallel"] = division
    assert run_ranks(train_rank, 2, str(write(run_mapping, tmp_path))) == [0, 0]
    check_results(tmp_path / "run", stream)


@pytest.mark.slow
@pytest.mark.parametrize(
    "division", [{}, {"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2, "sequence_parallel": True}]
)
@pytest.mark.parametrize("stream", ["texts", "images", "pairs"])
def test_experts_without_rows_change_nothing(
    run_mapping: dict[str, Any], tmp_path: Path, stream: str, division: dict[str, Any]
) -> None:
    """Compares losses and gradient norms of a model that has only the needed experts with the whole model."""
    keep_only(run_mapping, stream)
    run_mapping["gradient_accumulation_steps"] = 2
    run_mapping["beit3_ds"]["parallel"] = division
    run_mapping["zero_optimization"] = {"stage": 1 if "pipeline_parallel_size" in division else 3}
    found = []
    for inputs in ([stream], ["images", "pairs", "texts"]):
        run_mapping["beit3_ds"]["model"]["inputs"] = inputs
        run_mapping["beit3_ds"]["training"]["output_dir"] = str(tmp_path / f"run{len(inputs)}")
        assert run_ranks(train_rank, 2, str(write(run_mapping, tmp_path))) == [0, 0]
        lines = [
            json.loads(line) for line in (tmp_path / f"run{len(inputs)}" / "metrics.jsonl").read_text().splitlines()
        ]
        found.append([(line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line])
    assert len(found[0]) == 2 and found[0] == found[1]


def test_model_must_take_the_streams(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    from beit3_ds.config import ConfigError, build_run_config
    from beit3_ds.tasks import build_task

    run_mapping["beit3_ds"]["model"]["inputs"] = ["pairs"]
    with pytest.raises(ConfigError, match=r'inputs=\["pairs"\], but pretraining has batches of images and texts\. Add'):
        build_task(build_run_config(run_mapping))


def test_a_run_without_texts_needs_no_text_tokenizer(
    run_mapping: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_only(run_mapping, "images")
    assert cli.main(["train-text-tokenizer", str(write(run_mapping, tmp_path))]) == 2
    assert "needs no text tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("stream", ["texts", "images"])
def test_missing_tokenizer_of_a_used_stream_is_named(run_mapping: dict[str, Any], stream: str) -> None:
    from beit3_ds.config import ConfigError, build_run_config
    from beit3_ds.tasks import build_task

    kind = {"texts": "text", "images": "visual"}[stream]
    del run_mapping["beit3_ds"]["tokenizers"][kind]
    with pytest.raises(ConfigError, match=rf"tokenizers\.{kind}\.path is missing"):
        build_task(build_run_config(run_mapping))
