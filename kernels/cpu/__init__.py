"""Implements memory, row chunks and products of the operations on a CPU."""
