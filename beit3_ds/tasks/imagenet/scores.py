"""Classifies all images of a split and computes metrics."""

# I images of a batch, C classes, D features.

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.data.samples import Split
from beit3_ds.model import StepFeatures
from beit3_ds.parallel import Mesh
from beit3_ds.tasks.imagenet.head import CLASSES
from beit3_ds.tasks.imagenet.packing import INDICES
from beit3_ds.tasks.imagenet.samples import ClassText
from beit3_ds.tasks.rank_task import Evaluator
from beit3_ds.tasks.results import GatheredResults, SampleResults
from beit3_ds.tasks.retrieval.head import IMAGE_FEATURES, SCALE, TEXT_FEATURES

NUM_SHOWN = 5
"""Number of best-scored classes per image in result files."""


class ClassScores(NamedTuple):
    """Holds the classification of all images of a split, sorted by the images' index in the split."""

    indices: Tensor
    """Index of each image in its split, ascending, (images,) int64."""
    labels: Tensor
    """True class label of each image, (images,) int64."""
    ranks: Tensor
    """Rank of the true class among all classes for each image, 0 for the best score, (images,) int64. Of classes with
    equal scores, the smaller label ranks first."""
    best: Tensor
    """Labels of the best-scored classes of each image, best first, (images, at most `NUM_SHOWN`) int64."""
    losses: Tensor
    """Cross entropy of each image over all classes, (images,) float32."""

    def metrics(self) -> dict[str, float]:
        """Returns mean loss, top-1 accuracy, top-5 accuracy and the number of images; empty without images."""
        if not len(self.labels):
            return {}
        return {
            "classes": self.losses.double().mean().item(),
            "accuracy": (self.ranks < 1).double().mean().item(),
            "top5": (self.ranks < 5).double().mean().item(),
            "images": float(len(self.labels)),
        }


def score_split(
    evaluator: Evaluator, split: Split, texts: Sequence[ClassText], batches: Sequence[PackedBatch]
) -> ClassScores | None:
    """Classifies all images of a split; all ranks must call this function.

    Args:
        evaluator: gives access to the model and the ranks.
        split: name of the split.
        texts: texts of all classes; empty for a linear head.
        batches: this rank's batches of class texts (`share_of_batches`); unused for a linear head.

    Returns:
        On the main rank, the classification of all images; None on other ranks.
    """
    classes_CD = _encode_classes(evaluator, batches, len(texts)) if texts else None
    results = SampleResults()
    for batch, output in evaluator.predict(evaluator.batches(split)):
        if output is not None and evaluator.mesh.tensor.rank == 0:
            scores_IC = output if classes_CD is None else _compare(output, classes_CD)
            results.add(batch.targets[INDICES], **score_images(scores_IC, batch.targets[CLASSES]))
    gathered = results.gather(evaluator.mesh)
    return None if gathered is None else _read(gathered)


def score_images(scores_IC: Tensor, labels_I: Tensor) -> dict[str, Tensor]:
    """Returns `labels`, `ranks`, `best` and `losses` of the images of a batch, as in `ClassScores`.

    Args:
        scores_IC: score of each class for each image, (images, classes).
        labels_I: true class label of each image, (images,) int64.
    """
    own_I1 = scores_IC.gather(1, labels_I[:, None])
    is_before_IC = torch.arange(scores_IC.shape[1], device=scores_IC.device) < labels_I[:, None]
    ranks_I = ((scores_IC > own_I1) | ((scores_IC == own_I1) & is_before_IC)).sum(1)
    best_I = scores_IC.sort(dim=1, descending=True, stable=True).indices[:, :NUM_SHOWN]
    losses_I = -scores_IC.log_softmax(1).gather(1, labels_I[:, None])[:, 0]
    return {"labels": labels_I, "ranks": ranks_I, "best": best_I, "losses": losses_I}


def share_of_batches(batches: Iterator[PackedBatch], nothing: PackedBatch, rank: int, size: int) -> list[PackedBatch]:
    """Returns this rank's batches: batch `rank` and every `size`-th batch after it.

    Empty batches are added until all ranks have the same number of batches. A batch is never split, so the features of
    a batch do not depend on the number of ranks.

    Args:
        batches: all batches.
        nothing: an empty batch.
        rank: rank in the data-parallel group.
        size: size of the data-parallel group.
    """
    whole = list(batches)
    whole += [nothing] * (-len(whole) % size)
    return whole[rank::size]


def _encode_classes(evaluator: Evaluator, batches: Sequence[PackedBatch], num_classes: int) -> Tensor | None:
    """Returns the features of all classes, (classes, features), on the last pipeline stage; None on other stages.

    The data-parallel ranks all-gather the features.
    """
    outputs = [output for _, output in evaluator.predict(batches)]
    if not evaluator.mesh.pipeline.is_last:
        return None
    own = torch.cat([output.rows[TEXT_FEATURES] for output in outputs])
    return _interleave(own, outputs, evaluator.mesh, num_classes)


def _interleave(own: Tensor, outputs: Sequence[StepFeatures], mesh: Mesh, num_classes: int) -> Tensor:
    """All-gathers the class features from the data-parallel ranks, and sorts them by class label.

    If there are R data-parallel ranks, batches r, r + R, r + 2 R and so on come from rank r.
    """
    lengths = mesh.data_host.gather([len(output.rows[TEXT_FEATURES]) for output in outputs])
    gathered = mesh.gather_rows_over_data(own, [sum(of_rank) for of_rank in lengths])
    parts = gathered.split([length for of_rank in lengths for length in of_rank])
    per_rank = len(lengths[0])
    ordered = [parts[rank * per_rank + turn] for turn in range(per_rank) for rank in range(len(lengths))]
    classes_CD = torch.cat(ordered)
    assert len(classes_CD) == num_classes, f"{len(classes_CD)} features of {num_classes} classes"
    return classes_CD


def _compare(output: Any, classes_CD: Tensor) -> Tensor:
    return output.shared[SCALE] * output.rows[IMAGE_FEATURES] @ classes_CD.T


def _read(gathered: GatheredResults) -> ClassScores:
    if not len(gathered):
        none = torch.empty(0, dtype=torch.int64)
        return ClassScores(none, none, none, none, torch.empty(0))
    labels, ranks, best, losses = map(gathered.tensor, ClassScores._fields[1:])
    return ClassScores(gathered.indices, labels, ranks, best, losses)
