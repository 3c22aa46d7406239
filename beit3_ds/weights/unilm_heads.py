"""Maps unilm's tensor names of task heads to this project's names, and infers a file's task from its tensors."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from beit3_ds.config import ModelConfig
from beit3_ds.model import Head
from beit3_ds.model.pretrained import EXTRA_PREFIX
from beit3_ds.tasks.captioning.head import CaptionHead
from beit3_ds.tasks.imagenet.head import LinearClassHead
from beit3_ds.tasks.nlvr2.head import StatementHead
from beit3_ds.tasks.pretraining.heads import MaskedModelingHeads
from beit3_ds.tasks.retrieval.head import INITIAL_LOG_SCALE, ContrastiveHead
from beit3_ds.tasks.vqa.head import AnswerHead

LOG_SCALE_KEY = "logit_scale"
"""Key of unilm's scalar parameter: the logarithm of the similarity scale.

This project's parameter `LOG_SCALE` is this logarithm minus the logarithm's initial value.
"""
LOG_SCALE = "heads.temperature.bias"
"""Name of this project's temperature parameter."""
HEAD_EXTRAS = frozenset({EXTRA_PREFIX + LOG_SCALE_KEY})
"""Names of unchanged head tensors that an import stores in addition to the converted ones. With them, a later export is
bitwise equal to the imported file."""

HeadBuilder = Callable[[ModelConfig, Any], Head]
"""Function that builds a head from the model's config and the tensor-parallel group."""

_LAYERS: dict[str, dict[str, str]] = {
    "vqa": {
        "pooler.norm": "heads.pooler.norm",
        "pooler.dense": "heads.pooler.dense",
        "head.0": "heads.dense",
        "head.1": "heads.hidden_norm",
        "head.3": "heads.answers",
    },
    "nlvr2": {
        "head.norm1": "heads.input_norm",
        "head.dense1": "heads.dense",
        "head.norm2": "heads.hidden_norm",
        "head.dense2": "heads.classes",
    },
    "imagenet": {"fc_norm": "heads.pooled_norm", "head": "heads.classes"},
}
_CONTRASTIVE = {
    "vision_head.weight": "heads.image.weight",
    "language_head.weight": "heads.text.weight",
    LOG_SCALE_KEY: LOG_SCALE,
}
_KEYS: dict[str, dict[str, str]] = {
    task: {f"{key}.{kind}": f"{name}.{kind}" for key, name in layers.items() for kind in ("weight", "bias")}
    for task, layers in _LAYERS.items()
} | {"retrieval": _CONTRASTIVE}
_LAST_BIAS = {"vqa": ("heads.answers.bias", "num_answers"), "imagenet": ("heads.classes.bias", "num_classes")}


def head_keys(held: Collection[str]) -> dict[str, str]:
    """Maps unilm's names of a task head's tensors to this project's names; empty if no task's head is complete.

    The MIM and MLM heads are not included.

    Args:
        held: names of all tensors in the weights. These may be unilm's or this project's names; the result is the same
            for both.
    """
    names = set(held)
    return next((keys for keys in _KEYS.values() if keys.keys() <= names or set(keys.values()) <= names), {})


def recognise_task(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """Infers the task of weights from their tensors; returns the task's name and settings.

    A complete head of VQAv2, NLVR2, ImageNet or retrieval decides the task. Otherwise the task is captioning if there
    is an MLM head but no MIM head, and pretraining in all other cases.

    Args:
        shapes: shape of every tensor, by this project's names.
    """
    task = next((task for task, keys in _KEYS.items() if set(keys.values()) <= shapes.keys()), None)
    if task is None:
        task = "captioning" if "heads.mlm.weight" in shapes and "heads.mim.weight" not in shapes else "pretraining"
    if task not in _LAST_BIAS:
        return {"name": task}
    name, setting = _LAST_BIAS[task]
    kind = {"head": "linear"} if task == "imagenet" else {}
    return {"name": task, **kind, setting: shapes[name][0]}


def head_builder(task: Mapping[str, Any]) -> HeadBuilder:
    """Returns a function that builds the head of a task.

    Args:
        task: result of `recognise_task`.
    """
    name = task["name"]
    if name == "vqa":
        return lambda config, tensor: AnswerHead(config, task["num_answers"], tensor)
    if name == "imagenet":
        return lambda config, tensor: LinearClassHead(config, task["num_classes"], tensor)
    plain: dict[str, HeadBuilder] = {
        "nlvr2": StatementHead,
        "captioning": CaptionHead,
        "retrieval": ContrastiveHead,
        "pretraining": MaskedModelingHeads,
    }
    return plain[name]


def import_log_scale(value: Tensor) -> Tensor:
    """Converts unilm's scalar `logit_scale` to this project's temperature parameter, (1,)."""
    return (value.double() - INITIAL_LOG_SCALE).to(value.dtype).reshape(1)


def export_log_scale(value: Tensor) -> Tensor:
    """Converts this project's temperature parameter, (1,), to unilm's scalar `logit_scale`."""
    return (value.double() + INITIAL_LOG_SCALE).to(value.dtype).reshape(())
