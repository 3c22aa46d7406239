"""Starts the ranks of a run on all hosts, supervises the ranks, and restarts the run after a failure."""
