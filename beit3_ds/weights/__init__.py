"""Weights in and out: export, import, inspection, and the formats of other projects."""
