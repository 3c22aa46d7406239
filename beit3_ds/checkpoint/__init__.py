"""Saves and loads the training state of a run, under any layout of ranks.

This package imports none of its modules: only saving and resuming need DeepSpeed, reading a checkpoint does not.
"""
