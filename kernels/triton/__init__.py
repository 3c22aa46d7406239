"""Defines this project's Triton kernels, launches them, and compiles them ahead of time."""
