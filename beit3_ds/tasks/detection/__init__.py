"""Detects objects and their masks (COCO, Objects365; paper section 3.2)."""

from beit3_ds.tasks.detection.task import TASK

__all__ = ["TASK"]
