"""Tests that imported fine-tuned weights give the reference's outputs, and are exported back bit for bit.

The outputs were recorded from the reference (`tests/fixtures/golden/README.md`).
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.cli import main as cli
from beit3_ds.layout import PickedRows
from beit3_ds.model import PretrainedWeights, TaskModel
from beit3_ds.model.features import pack_inputs
from beit3_ds.tasks.captioning.head import TARGET_IDS, sum_best_tokens
from beit3_ds.tasks.imagenet.head import patch_rows
from beit3_ds.tasks.nlvr2.head import LABELS
from beit3_ds.tasks.retrieval.contrastive import contrastive_sums
from beit3_ds.tasks.vqa.head import ANSWER_SCORES
from beit3_ds.weights.export import export_weights
from beit3_ds.weights.inspection import describe_weights
from beit3_ds.weights.reader import Backbone
from beit3_ds.weights.released import ReleasedFile
from beit3_ds.weights.unilm_heads import head_builder
from tests.batches import decoupled, small_model_config
from tests.weights.golden import CPU, Golden, import_golden, load_model, pack_golden, read_golden
from tests.weights.models import ModelReader

TASKS = {
    "vqav2": {"name": "vqa", "num_answers": 11},
    "nlvr2": {"name": "nlvr2"},
    "captioning": {"name": "captioning"},
    "retrieval": {"name": "retrieval"},
    "imagenet_linear": {"name": "imagenet", "head": "linear", "num_classes": 7},
}
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def load(name: str) -> tuple[Golden, TaskModel]:
        golden = read_golden(name)
        return golden, load_model(import_golden(golden, tmp_path, monkeypatch))

    return load


def reading(batch: PackedBatch, picked: PickedRows, **targets: Tensor) -> PackedBatch:
    return dataclasses.replace(batch, head_rows=picked.rows, head_row_counts=picked.counts, targets=targets)


@pytest.mark.parametrize("name", TASKS)
def test_exported_again_every_tensor_is_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = read_golden(name)
    weights = import_golden(golden, tmp_path, monkeypatch)
    assert weights.task == TASKS[name]
    assert weights.model.final_norm == (name not in ("vqav2", "imagenet_linear"))
    assert not [name for name in weights.names() if name.startswith("released.") and "head" in name]
    export_weights(weights, tmp_path / "back.pth", format="unilm-dual")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert back.keys() == golden.weights.keys()
    for key, value in golden.weights.items():
        assert back[key].shape == value.shape and torch.equal(back[key], value), key


@pytest.mark.parametrize("name", ["vqav2", "retrieval"])
def test_the_head_can_be_left_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = import_golden(read_golden(name), tmp_path, monkeypatch)
    export_weights(Backbone(weights), tmp_path / "backbone.safetensors")
    backbone = PretrainedWeights(tmp_path / "backbone.safetensors")
    assert backbone.task is None and backbone.model == weights.model
    lost = set(weights.names()) - set(backbone.names())
    assert lost == {name for name in weights.names() if name.startswith("heads.") or "logit_scale" in name}


def test_the_task_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = import_golden(read_golden("vqav2"), tmp_path, monkeypatch)
    text = describe_weights(weights.path)
    assert "task: vqa (num_answers 11)" in text and "head of the task" in text


def test_vqa(load: Any) -> None:
    golden, model = load("vqav2")
    batch = pack_golden(model, golden.inputs["image"], golden.texts())
    batch = reading(batch, batch.layout.first_rows(1), **{ANSWER_SCORES: golden.inputs["labels"]})
    assert_close(model(batch, None), golden.outputs["logits"])
    loss = model(batch, torch.tensor([1 / 3, 0.0])).total
    assert_close(loss, golden.outputs["loss"])
    loss.backward()
    assert_close(model.heads.answers.weight.grad, golden.outputs["grad.head.3.weight"])
    assert_close(model.embeddings.patch.weight.grad, golden.outputs["grad.patch"])


@torch.no_grad()
def test_nlvr2(load: Any) -> None:
    golden, model = load("nlvr2")
    images = torch.stack([golden.inputs["image"], golden.inputs["image2"]], dim=1).flatten(0, 1)
    batch = pack_golden(model, images, [text for text in golden.texts() for _ in range(2)])
    batch = reading(batch, batch.layout.first_rows(1, 2), **{LABELS: golden.inputs["label"]})
    assert_close(model(batch, None), golden.outputs["logits"])
    assert_close(model(batch, torch.tensor([1 / 3, 0.0])).total, golden.outputs["loss"])


@torch.no_grad()
def test_retrieval(load: Any) -> None:
    golden, model = load("retrieval")
    batch = pack_inputs(model.config, golden.inputs["image"], golden.texts(), None, CPU)
    features = model(reading(batch, batch.layout.first_rows(0, 3)), None)
    images, texts = features.rows["image"], features.rows["text"]
    assert_close(images, golden.outputs["image_features"])
    assert_close(texts, golden.outputs["text_features"])
    sums = contrastive_sums(features, mask_duplicates=False)
    assert_close((sums[0] + sums[1]) / (2 * len(images)), golden.outputs["loss"])


@torch.no_grad()
def test_imagenet_linear(load: Any) -> None:
    golden, model = load("imagenet_linear")
    batch = pack_inputs(model.config, golden.inputs["image"], None, None, CPU)
    assert_close(model(reading(batch, patch_rows(batch.layout)), None), golden.outputs["logits"])


@torch.no_grad()
def test_captioning(load: Any) -> None:
    golden, model = load("captioning")
    inputs = golden.inputs
    real = inputs["padding"] == 0
    texts = [ids[kept] for ids, kept in zip(inputs["masked_ids"], real, strict=True)]
    batch = dataclasses.replace(pack_golden(model, inputs["image"], texts), causal_captions=True)
    positions = inputs["masked"][real].nonzero().flatten()
    picked = PickedRows(batch.boundaries[1] + positions, (0, 0, len(positions), 0))
    batch = reading(batch, picked, **{TARGET_IDS: inputs["ids"][real][positions]})
    logits = model(batch, None)
    assert_close(logits, golden.outputs["logits"])

    model.heads.mlm.label_smoothing = 0.1
    assert_close(model(batch, torch.tensor([1 / 7, 0.0])).total, golden.outputs["loss"])
    model.heads.compares_tokens = True
    assert_close(sum_best_tokens(model(batch, torch.ones(2)), 0.2)[0] / 7, golden.outputs["loss_drop_worst"])


def test_the_command_keeps_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import_golden(read_golden("vqav2"), tmp_path, monkeypatch)
    released, out, answers = (str(tmp_path / name) for name in ("released.pth", "out.safetensors", "answer2label.txt"))
    lines = [json.dumps({"answer": f"answer {label}", "label": label}) for label in range(11)]
    Path(answers).write_text("\n".join(lines))
    assert cli.main(["import", released, out, "--answers", answers]) == 0
    assert "head: vqa (num_answers 11, answers of 11)" in capsys.readouterr().out
    task = PretrainedWeights(out).task
    assert task is not None and task["answers"][10] == "answer 10"
    Path(answers).write_text(lines[0])
    assert cli.main(["import", released, out, "--answers", answers, "--force"]) == 2
    assert "has 1 answers, but the head" in capsys.readouterr().err
    torch.save({"model": read_golden("nlvr2").weights}, released)
    assert cli.main(["import", released, out, "--answers", answers, "--force"]) == 2
    assert "task nlvr2, which has no list of answers" in capsys.readouterr().err


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("layout", ["shared", "decoupled"])
def test_own_fine_tuned_models_come_back(name: str, layout: str, tmp_path: Path) -> None:
    """Exports models as trained by runs, without the metadata that an import keeps."""
    norm = {"final_norm": name not in ("vqav2", "imagenet_linear")}
    config = decoupled(**norm) if layout == "decoupled" else small_model_config(num_vision_language_layers=0, **norm)
    model, task = TaskModel(head_builder(TASKS[name]), config), TASKS[name] | {"answers": ["yes", "no"]}
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    reader = ModelReader(model)
    reader.task = task
    export_weights(reader, tmp_path / "out.pth", format="unilm-dual")
    back = ReleasedFile(tmp_path / "out.pth")
    assert back.task == task and back.model == config
    parameters = dict(model.named_parameters())
    assert set(back.names()) - {"released.logit_scale"} == parameters.keys()
    for own, parameter in parameters.items():
        # Only the temperature is stored as another number there.
        tolerance = 3e-7 if own == "heads.temperature.bias" else 0
        torch.testing.assert_close(back.read(own), parameter.detach(), rtol=0, atol=tolerance)
