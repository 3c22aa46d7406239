"""Computes the loss and the accuracy of a step in which images are compared with class names."""

# I images and X texts of the whole step, C different classes of the texts, D features.

import torch
from torch import Tensor

from beit3_ds.model import StepFeatures
from beit3_ds.tasks.imagenet.head import CLASSES
from beit3_ds.tasks.imagenet.mixing import WHOLE
from beit3_ds.tasks.imagenet.packing import OTHER_CLASSES, SHARES, TEXT_CLASSES
from beit3_ds.tasks.retrieval.head import IMAGE_FEATURES, SCALE, TEXT_FEATURES


def class_terms(features: StepFeatures, label_smoothing: float) -> Tensor:
    """Returns the sum of the cross entropies of all images and the number of correct answers, (2,) float32.

    Only the cross entropy has a gradient. The softmax is over the classes whose texts the step contains; these must
    include the classes of all images. If a class has several texts, the mean of their features is used, so a class is
    never its own negative.

    Args:
        features: features and labels of all images and texts of the step, and the scale of scores.
        label_smoothing: share of the target that is spread evenly over the classes.
    """
    rows = features.rows
    classes_C, place_X = rows[TEXT_CLASSES].unique(return_inverse=True)
    text_XD = rows[TEXT_FEATURES]
    counts_C = torch.zeros(len(classes_C), device=text_XD.device).index_add(0, place_X, torch.ones_like(text_XD[:, 0]))
    text_CD = text_XD.new_zeros(len(classes_C), text_XD.shape[1]).index_add(0, place_X, text_XD) / counts_C[:, None]
    logits_IC = features.shared[SCALE] * rows[IMAGE_FEATURES] @ text_CD.T
    log_probabilities_IC = logits_IC.log_softmax(1)
    own_I = torch.searchsorted(classes_C, rows[CLASSES])
    other_I = torch.searchsorted(classes_C, rows[OTHER_CLASSES])
    share_I = rows[SHARES] / WHOLE
    target_I = share_I * _pick(log_probabilities_IC, own_I) + (1 - share_I) * _pick(log_probabilities_IC, other_I)
    smooth_I = log_probabilities_IC.sum(1) / max(1, len(classes_C))
    loss = -((1 - label_smoothing) * target_I + label_smoothing * smooth_I).sum()
    right = (logits_IC.detach().argmax(1) == own_I).sum() if len(classes_C) else torch.zeros_like(loss)
    return torch.stack([loss, right.float()])


def _pick(x_IC: Tensor, place_I: Tensor) -> Tensor:
    return x_IC.gather(1, place_I[:, None])[:, 0]
