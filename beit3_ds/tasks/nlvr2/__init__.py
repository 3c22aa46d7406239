"""Decides whether a statement is true of two images (NLVR2; paper section 3.1)."""
