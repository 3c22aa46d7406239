"""Saves and loads the training state of a run, under any layout of ranks.

Importing the package loads none of its modules. So code that only reads a checkpoint does not import DeepSpeed, which
saving and resuming need.
"""
