"""Triton kernels, their launching, and their compilation ahead of time."""
