"""Implements visual question answering, which answers questions about images (VQAv2; paper section 3.1)."""

from beit3_ds.tasks.vqa.task import TASK

__all__ = ["TASK"]
