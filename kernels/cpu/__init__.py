"""Provides the operations on a CPU with memory, chunks of rows and matrix products."""
