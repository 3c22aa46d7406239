"""Measures the time that a step needs on the host, without the time of its kernels."""
