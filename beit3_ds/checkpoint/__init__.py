"""Saves and loads the training state of a run, under any layout of ranks.

Nothing is imported here: saving and resuming need DeepSpeed, reading a checkpoint does not.
"""
