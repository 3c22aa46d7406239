"""Defines Triton kernels, launches them, and compiles them ahead of time."""
