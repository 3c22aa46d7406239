"""Defines the model's operations (ops) on packed rows, each with a reference in PyTorch and a backward pass.

Packed rows are the rows of several sequences in one tensor, without padding.
"""
