"""Implements pretraining by masked data modeling of images, texts and image-text pairs (paper section 2.2)."""

from beit3_ds.tasks.pretraining.task import TASK

__all__ = ["TASK"]
