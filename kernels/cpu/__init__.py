"""Provides memory, row chunks and matrix products to the operations on a CPU."""
