"""Defines the settings of the retrieval task."""

from dataclasses import dataclass

from beit3_ds.config.numbers import Count


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Configures the "task" section of a retrieval run."""

    mask_duplicates: bool = True
    """Whether a pair with the same image or the same caption as another pair of the step is left out of the other's
    negatives. The reference counts such pairs as negatives, although they match. A sample is an image with one of its
    captions, so one image occurs twice in a step only at the end of an epoch, or in corpora that list it several
    times."""
    shown_queries: Count = 24
    """Images and captions each that the page of an evaluation shows."""
