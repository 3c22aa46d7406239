"""Writes output that may fail for a while: what cannot be written is kept and written later."""
