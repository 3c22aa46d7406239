"""Reads texts: cuts files into paragraphs, encodes these to ids, and packs ids into sequences."""
