"""Decides whether a statement is true of two images (NLVR2; paper section 3.1)."""

from beit3_ds.tasks.nlvr2.task import TASK

__all__ = ["TASK"]
