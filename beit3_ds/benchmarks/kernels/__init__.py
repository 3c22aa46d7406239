"""Benchmarks of the ops beside their baselines."""
