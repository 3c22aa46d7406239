"""Reads texts: cuts files into paragraphs, encodes paragraphs to token ids, and packs them into sequences."""
