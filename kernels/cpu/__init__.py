"""Provides CPU implementations of memory allocation, row chunks and matrix products, which the ops use."""
