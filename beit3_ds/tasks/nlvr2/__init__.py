"""Implements NLVR2, which asks whether a statement about two images is true (paper section 3.1)."""

from beit3_ds.tasks.nlvr2.task import TASK

__all__ = ["TASK"]
