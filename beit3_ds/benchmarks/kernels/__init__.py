"""Benchmarks the ops in `kernels` against baselines."""
