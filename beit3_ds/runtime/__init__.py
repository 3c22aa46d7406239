"""Connects, watches and stops the ranks of a run."""
