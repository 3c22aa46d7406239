"""Writes small weights of every task, and pictures, for the tests of inference."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from beit3_ds.config import ModelConfig
from beit3_ds.model import Head, TaskModel
from beit3_ds.tasks.captioning.head import CaptionHead
from beit3_ds.tasks.imagenet.head import LinearClassHead
from beit3_ds.tasks.nlvr2.head import StatementHead
from beit3_ds.tasks.retrieval.head import ContrastiveHead
from beit3_ds.tasks.vqa.head import AnswerHead
from beit3_ds.tokenizers import TextTokenizer
from beit3_ds.weights.export import export_weights
from tests.batches import small_model_config
from tests.weights.models import ModelReader

ANSWERS = ["yes", "no", "red", "2"]
TEXTS = ["a dog on the beach", "two cats"]
TASKS: dict[str, Callable[..., Head]] = {
    "vqa": lambda config, tensor: AnswerHead(config, len(ANSWERS), tensor),
    "nlvr2": StatementHead,
    "captioning": CaptionHead,
    "retrieval": ContrastiveHead,
    "imagenet": lambda config, tensor: LinearClassHead(config, 3, tensor),
}


@torch.no_grad()
def task_model(task: str, config: ModelConfig | None = None) -> TaskModel:
    """Returns a whole model of a task with random weights."""
    config = config or small_model_config(text_vocab_size=310)
    model, generator = TaskModel(TASKS[task], config), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.2, generator=generator)
        if "norm.weight" in name:
            parameter += 1
    return model.eval()


def write_task_weights(path: Path, task: str, settings: Mapping[str, Any] | None = None) -> TaskModel:
    """Exports random weights of a task; returns the model."""
    model = task_model(task)
    reader = ModelReader(model)
    reader.task = {"name": task, **(settings or {})}
    export_weights(reader, path)
    return model


def draw_photo(path: Path, seed: int = 0) -> Path:
    """Writes a picture that is not square."""
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def ids_of(spm: Path, text: str) -> list[int]:
    """Returns the token ids of a text, cut off after 20."""
    tokenizer = TextTokenizer(spm)
    return [tokenizer.bos_id, *tokenizer.encode(text)[:18], tokenizer.eos_id]
