"""Prepares the files of a run before it starts, and describes its data (`beit3 prepare`)."""
