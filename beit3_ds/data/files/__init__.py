"""Finds, opens and reads the files of a run, and describes them."""
