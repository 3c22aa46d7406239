"""Prepares the data files of a run before the run starts, and describes the data (`beit3 prepare`)."""
