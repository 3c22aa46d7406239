"""Defines the settings of the retrieval task."""

from dataclasses import dataclass

from beit3_ds.config.numbers import Count


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Configures the "task" section of a retrieval run."""

    mask_duplicates: bool = True
    """Whether two pairs of a step with the same image or the same caption are not used as negatives of each other. The
    reference uses them as negatives. Each image is in one sample per epoch, so an image occurs twice in a step only at
    the border of two epochs, or if the sources list it several times."""
    shown_queries: Count = 24
    """Number of images, and also of captions, on the page that an evaluation writes."""
