"""Implements training of the visual tokenizer, VQ-KD of BEiT v2 (Peng et al., 2022, arXiv:2208.06366)."""

from beit3_ds.tasks.visual_tokenizer.task import TASK

__all__ = ["TASK"]
