"""Benchmarks that read and prepare data."""
