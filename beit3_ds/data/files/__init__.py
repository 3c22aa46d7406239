"""Finds, opens, reads and describes the files of a run."""
