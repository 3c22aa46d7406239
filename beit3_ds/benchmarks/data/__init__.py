"""Benchmarks the reading and preparation of training data."""
