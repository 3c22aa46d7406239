"""Provides memory allocation, chunks of rows and matrix products for the CPU implementations of the ops."""
