"""Saves and loads the training state of a run under any layout of ranks.

Importing the package loads none of its modules, so readers of checkpoints do not import DeepSpeed.
"""
