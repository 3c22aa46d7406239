"""Writes and describes what a run needs before it starts (`beit3 prepare`)."""
