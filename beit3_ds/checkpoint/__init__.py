"""Saving and resuming a run."""

from beit3_ds.checkpoint.store import CheckpointStore

__all__ = ["CheckpointStore"]
