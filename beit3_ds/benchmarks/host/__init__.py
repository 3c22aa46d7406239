"""Measures the host's time per training step, without the time of GPU kernels."""
