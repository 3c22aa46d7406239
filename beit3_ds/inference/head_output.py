"""Runs a model with its task head, and computes the head's predictions for chosen rows of a batch."""

import dataclasses
from typing import Any

from beit3_ds.batch import PackedBatch
from beit3_ds.layout import PickedRows
from beit3_ds.model import TaskModel


def head_output(model: TaskModel, batch: PackedBatch, picked: PickedRows) -> Any:
    """Returns the predictions of a model's head for chosen rows; the last block's FFN computes only these rows.

    Args:
        model: a model with all layers and a head.
        batch: the inputs, on the model's device.
        picked: rows that the head reads.
    """
    rows = picked.rows.to(batch.token_ids.device)
    return model(dataclasses.replace(batch, head_rows=rows, head_row_counts=picked.counts), None)
