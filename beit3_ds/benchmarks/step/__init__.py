"""Benchmarks whole training steps."""
