"""Implements semantic segmentation, which predicts a class for each pixel (ADE20K; paper section 3.2)."""

from beit3_ds.tasks.segmentation.task import TASK

__all__ = ["TASK"]
