"""The schedule that owns micro-batches."""

from beit3_ds.pipeline.schedule import accumulate_gradients

__all__ = ["accumulate_gradients"]
