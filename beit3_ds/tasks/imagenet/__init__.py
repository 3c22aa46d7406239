"""Implements image classification by retrieving class names (ImageNet; paper section 3.2)."""

from beit3_ds.tasks.imagenet.task import TASK

__all__ = ["TASK"]
