"""Prepares the files of a run before the run starts, and describes the run's data (`beit3 prepare`)."""
