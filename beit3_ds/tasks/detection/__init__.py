"""Implements object detection and instance segmentation (COCO, Objects365; paper section 3.2)."""

from beit3_ds.tasks.detection.task import TASK

__all__ = ["TASK"]
