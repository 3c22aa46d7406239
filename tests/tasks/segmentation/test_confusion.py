"""Compares pixel counts and their means with scikit-learn."""

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from beit3_ds.tasks.segmentation.config import IGNORED
from beit3_ds.tasks.segmentation.confusion import Confusion


def test_counts_and_means_equal_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (40, 50), generator=generator, dtype=torch.uint8)
    predicted = torch.randint(0, 7, (40, 50), generator=generator, dtype=torch.uint8)  # 5 and 6 never occur
    truth[:5] = IGNORED
    parts = [Confusion.of(truth[rows], predicted[rows], 8) for rows in (slice(0, 13), slice(13, 40))]
    whole = parts[0] + parts[1]
    known = truth != IGNORED
    wanted = confusion_matrix(truth[known], predicted[known], labels=range(8))
    assert whole.counts_CC.tolist() == wanted.tolist()
    # Class 7 is nowhere and does not count; 5 and 6 are predicted and have the IoU 0.
    ious = jaccard_score(truth[known], predicted[known], labels=range(7), average=None, zero_division=0)
    np.testing.assert_allclose(whole.iou()[:7], ious)
    np.testing.assert_allclose(whole.metrics()["mIoU"], np.mean(ious), rtol=1e-12)
    assert whole.metrics()["pixel_accuracy"] == (truth == predicted)[known].double().mean().item()


def test_an_image_without_labels_has_no_metrics() -> None:
    nothing = torch.full((3, 3), IGNORED, dtype=torch.uint8)
    assert Confusion.of(nothing, torch.zeros_like(nothing), 4).metrics() == {}
