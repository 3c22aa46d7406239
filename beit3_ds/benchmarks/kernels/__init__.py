"""Benchmarks the ops in `kernels` and their baselines."""
