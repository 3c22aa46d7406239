"""Defines, launches and compiles Triton kernels."""
