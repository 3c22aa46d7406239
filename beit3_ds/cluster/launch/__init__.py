"""Starts the ranks of a run on all hosts for `beit3 launch`, supervises them, and restarts the run after a failure."""
