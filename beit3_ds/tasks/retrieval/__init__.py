"""Implements retrieval of texts for images and of images for texts (COCO and Flickr30K; paper section 3.1)."""

from beit3_ds.tasks.retrieval.task import TASK

__all__ = ["TASK"]
