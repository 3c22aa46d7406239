"""Benchmarks the reading and preparation of data."""
