"""Computes the loss and the accuracy of a training step from image features and from text features of class names."""

# I images and X texts of the whole step, C = X places for the different classes of the texts, D features.

import torch
from torch import Tensor

from beit3_ds.model import StepFeatures
from beit3_ds.tasks.imagenet.head import CLASSES
from beit3_ds.tasks.imagenet.mixing import WHOLE
from beit3_ds.tasks.imagenet.packing import OTHER_CLASSES, SHARES, TEXT_CLASSES
from beit3_ds.tasks.retrieval.head import IMAGE_FEATURES, SCALE, TEXT_FEATURES


def class_terms(features: StepFeatures, label_smoothing: float) -> Tensor:
    """Returns two sums over all images of a step, (2,) float32: the cross entropy, and the number of correct answers.

    Only the cross entropy has a gradient. The softmax is over the classes whose texts the step encodes. The classes of
    all images must be among them. If a class has several texts, the features of these texts are averaged.

    Args:
        features: features and labels of all images and texts of the step, and the scale of scores.
        label_smoothing: share of the target probability that is spread evenly over the classes.
    """
    rows, text_XD = features.rows, features.rows[TEXT_FEATURES]
    classes_C, place_X = _distinct(rows[TEXT_CLASSES])
    counts_C = text_XD.new_zeros(len(text_XD)).index_add(0, place_X, torch.ones_like(text_XD[:, 0]))
    text_CD = torch.zeros_like(text_XD).index_add(0, place_X, text_XD) / counts_C.clamp(min=1)[:, None]
    logits_IC = features.shared[SCALE] * rows[IMAGE_FEATURES] @ text_CD.T
    is_empty_C = counts_C == 0
    logits_IC = logits_IC.masked_fill(is_empty_C, -torch.inf)
    log_probabilities_IC = logits_IC.log_softmax(1)
    own_I = torch.searchsorted(classes_C, rows[CLASSES])
    other_I = torch.searchsorted(classes_C, rows[OTHER_CLASSES])
    share_I = rows[SHARES] / WHOLE
    target_I = share_I * _pick(log_probabilities_IC, own_I) + (1 - share_I) * _pick(log_probabilities_IC, other_I)
    smooth_I = log_probabilities_IC.masked_fill(is_empty_C, 0).sum(1) / (~is_empty_C).sum().clamp(min=1)
    loss = -((1 - label_smoothing) * target_I + label_smoothing * smooth_I).sum()
    right = (logits_IC.detach().argmax(1) == own_I).sum() if len(classes_C) else torch.zeros_like(loss)
    return torch.stack([loss, right.float()])


def _distinct(labels_X: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distinct labels, ascending, and the index of each label among them, like `torch.unique`.

    The distinct labels are padded with the largest int64 value to the length of `labels_X`. All shapes are therefore
    known in advance, and the host need not wait for the device.
    """
    sorted_X, order_X = labels_X.sort()
    is_new_X = torch.ones_like(sorted_X)
    is_new_X[1:] = sorted_X[1:] != sorted_X[:-1]
    sorted_place_X = is_new_X.cumsum(0) - 1
    place_X = torch.empty_like(order_X).scatter(0, order_X, sorted_place_X)
    distinct_X = torch.full_like(labels_X, torch.iinfo(labels_X.dtype).max).scatter(0, sorted_place_X, sorted_X)
    return distinct_X, place_X


def _pick(x_IC: Tensor, place_I: Tensor) -> Tensor:
    return x_IC.gather(1, place_I[:, None])[:, 0]
