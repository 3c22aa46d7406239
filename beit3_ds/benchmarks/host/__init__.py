"""Measures the CPU time per training step that Python and PyTorch need on the host, without GPU kernels."""
