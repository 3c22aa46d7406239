"""Segments images: assigns a class to each pixel (ADE20K; paper section 3.2)."""

from beit3_ds.tasks.segmentation.task import TASK

__all__ = ["TASK"]
