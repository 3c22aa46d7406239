"""Generates captions of images word by word, with a cache of keys and values."""

from beit3_ds.model.generation.beam_search import BeamSearch, Caption, SpecialIds, generate
from beit3_ds.model.generation.decoder import CaptionDecoder

__all__ = ["BeamSearch", "Caption", "CaptionDecoder", "SpecialIds", "generate"]
