"""Saving and resuming a run, and getting weights out and in.

Nothing is imported here: saving and resuming need DeepSpeed, reading and converting do not.
"""
