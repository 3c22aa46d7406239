"""Implements captioning, which generates captions of images (COCO and nocaps; paper section 3.1)."""

from beit3_ds.tasks.captioning.task import TASK

__all__ = ["TASK"]
