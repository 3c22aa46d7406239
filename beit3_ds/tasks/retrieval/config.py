"""Defines the keys of the "task" section for retrieval."""

from dataclasses import dataclass

from beit3_ds.config.numbers import Count


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Configures image-text retrieval."""

    mask_duplicates: bool = True
    """Whether to exclude false negatives: two pairs of a step with the same image or the same caption are then not
    negatives of each other. Microsoft's BEiT-3 code does not exclude false negatives. Two pairs with the same image
    occur only at the border of two epochs, or if the sources list an image several times."""
    shown_queries: Count = 24
    """Number of images for which the result page shows retrieved captions. Also the number of captions for which the
    page shows retrieved images."""
