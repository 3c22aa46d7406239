"""Launches and supervises a run for `beit3 launch`: attempts, guards of the ranks, and restarts."""
