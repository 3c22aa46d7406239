"""Finds likely captions of images by beam search, like the captioning of BEiT-3's released code.

A sequence consists of BOS, words, and a mask token at which the model predicts the next word. The score of a caption is
the summed log-probability of its words and EOS, divided by length ** length_penalty. The length counts BOS, the words
and the mask token.
"""

# I images, B beams, R captions, V vocabulary.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from beit3_ds.config import ConfigError
from beit3_ds.model.generation.decoder import CaptionDecoder
from beit3_ds.model.task_model import TaskModel

_CANDIDATES_PER_BEAM = 3
"""Number of candidate words per beam and step, as in BEiT-3's released code."""


class SpecialIds(Protocol):
    """Declares the ids of the special tokens, which `TextTokenizer` provides."""

    @property
    def bos_id(self) -> int:
        """Returns the id of BOS, which begins every caption."""

    @property
    def eos_id(self) -> int:
        """Returns the id of EOS, which ends every caption."""

    @property
    def mask_id(self) -> int:
        """Returns the id of the mask token."""


@dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """Configures the beam search. The defaults are the captioning settings of BEiT-3's released code."""

    num_beams: int = 3
    """Number of unfinished captions to keep per image; 1 is greedy search."""
    length_penalty: float = 0.6
    """Exponent of the length in a caption's score. Larger values favour longer captions."""
    max_length: int = 20
    """Maximum number of tokens, counting BOS, EOS and the mask token. So the text of a caption has at most `max_length`
    - 3 tokens."""

    def __post_init__(self) -> None:
        if self.num_beams < 1 or self.max_length < 4:
            raise ConfigError(
                f"captions: num_beams={self.num_beams} and max_length={self.max_length}, but at least 1 beam and 4 ids "
                "(BOS, a word, a placeholder and EOS) are needed."
            )


class Caption(NamedTuple):
    """Holds a generated caption and its score."""

    ids: tuple[int, ...]
    """Token ids of the words, without BOS and EOS."""
    score: float
    """Summed log-probability divided by length ** length_penalty."""


@torch.no_grad()
def generate(model: TaskModel, pixels: Tensor, tokens: SpecialIds, search: BeamSearch | None = None) -> list[Caption]:
    """Returns the best caption of each image.

    Each image is encoded once. Images whose search has ended are no longer computed. A caption does not depend on the
    other images.

    Args:
        model: model with all layers and a head that predicts words, in evaluation mode; must accept pairs.
        pixels: images, (images, 3, image_size, image_size) in [-1, 1], on the model's device.
        tokens: object with the ids of the special tokens, for example a `TextTokenizer`.
        search: settings of the beam search; None uses `BeamSearch()`.

    Raises:
        ConfigError: if the model does not accept pairs or does not predict words, if the model has fewer than
            `max_length` - 1 text positions, or if there are more candidates per step than words in the vocabulary.
    """
    search = search or BeamSearch()
    _check(model, search)
    if not len(pixels):
        return []
    decoder = CaptionDecoder(model, pixels, tokens.mask_id)
    searches = [_ImageSearch(search, tokens.eos_id) for _ in pixels]
    active, ids, beams = list(searches), [tokens.bos_id] * len(pixels), 1
    while active:
        log_probs_RV = decoder.next_words(torch.tensor(ids, device=pixels.device))
        earlier = torch.tensor([image.scores for image in active], device=pixels.device)
        totals = (log_probs_RV.view(len(active), beams, -1) + earlier[:, :, None]).flatten(1)
        best = totals.topk(_CANDIDATES_PER_BEAM * search.num_beams)
        candidates = zip(best.values.tolist(), best.indices.tolist(), strict=True)  # waits for the device
        is_active = [
            image.advance(values, indices, log_probs_RV.shape[1])
            for image, (values, indices) in zip(active, candidates, strict=True)
        ]
        order = _places_of_active(is_active)
        active = [active[place] for place in order]
        if active:
            decoder.drop_images(order)
            decoder.select(
                [place * beams + p for place, image in zip(order, active, strict=True) for p in image.parents]
            )
            ids, beams = [word for image in active for word in image.last_words], search.num_beams
    return [image.best for image in searches]


class _ImageSearch:
    """Holds the beams and the best complete caption of one image."""

    def __init__(self, search: BeamSearch, eos_id: int) -> None:
        self.scores, self.parents = [0.0], [0]
        self.best = Caption((), -float("inf"))
        self._search, self._eos_id = search, eos_id
        self._words: list[tuple[int, ...]] = [()]

    @property
    def last_words(self) -> list[int]:
        """Returns the last word of each beam."""
        return [words[-1] for words in self._words]

    def advance(self, scores: Sequence[float], indices: Sequence[int], vocab_size: int) -> bool:
        """Extends the beams by the best candidates, and returns whether the search continues.

        Args:
            scores: summed log-probability of each candidate, in descending order.
            indices: beam * vocab_size + word of each candidate.
            vocab_size: size of the vocabulary.
        """
        limit = self._search.max_length
        # An upper bound for unfinished captions, because adding words only lowers the log-probability.
        if self.best.score >= scores[0] / (limit - 1) ** self._search.length_penalty:
            return False
        length = len(self._words[0]) + 2  # number of tokens with BOS and the mask token
        beams: list[tuple[float, int, int]] = []
        for score, index in zip(scores, indices, strict=True):
            beam, word = divmod(index, vocab_size)
            if word == self._eos_id or length + 1 == limit:  # at the limit the last word is scored, but not kept
                score /= length**self._search.length_penalty
                self.best = max(self.best, Caption(self._words[beam], score), key=lambda caption: caption.score)
            else:
                beams.append((score, beam, word))
            if len(beams) == self._search.num_beams:
                break
        if not beams:
            return False
        self.scores, self.parents = [score for score, _, _ in beams], [beam for _, beam, _ in beams]
        self._words = [(*self._words[beam], word) for _, beam, word in beams]
        return True


def _places_of_active(is_active: Sequence[bool]) -> list[int]:
    """Returns the indices of the unfinished images in an order that moves as few images as possible.

    Images from the end fill the positions of finished images. All other images keep their positions.
    """
    order = list(range(len(is_active)))
    for place in reversed(order.copy()):
        if not is_active[place]:
            last = order.pop()
            if place < len(order):
                order[place] = last
    return order


def _check(model: TaskModel, search: BeamSearch) -> None:
    config = model.config
    if search.max_length - 1 > config.max_text_length:
        raise ConfigError(
            f"captions of max_length={search.max_length} need {search.max_length - 1} positions, but the model has "
            f"max_text_length={config.max_text_length}. Lower max_length, or load the model with a larger "
            "max_text_length."
        )
    if _CANDIDATES_PER_BEAM * search.num_beams > config.text_vocab_size:
        raise ConfigError(
            f"num_beams={search.num_beams} considers {_CANDIDATES_PER_BEAM * search.num_beams} words per step, but the "
            f"vocabulary has {config.text_vocab_size}. Lower num_beams."
        )
