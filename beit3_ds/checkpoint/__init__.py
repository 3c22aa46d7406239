"""Saves and loads the training state of a run under any layout of ranks.

The package imports none of its modules, so that reading a checkpoint does not import DeepSpeed.
"""
